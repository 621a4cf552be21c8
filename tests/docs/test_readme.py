"""The README's examples run, and the commands it names exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paged_jax import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def _param(code):
  marks = [pytest.mark.model] if "demo" in code else []
  return pytest.param(code, marks=marks, id=code.splitlines()[0])


def _commands(program):
  """Arguments of every call of `program` in the README's shell blocks."""
  lines = "\n".join(_blocks("sh")).splitlines()
  calls = [shlex.split(line, comments=True) for line in lines]
  return [call[1:] for call in calls if call[:1] == [program]]


def _run(*args):
  # A process of its own: the strict settings of the tests are not a reader's.
  done = subprocess.run(
    [sys.executable, "-W", "error", *args],
    cwd=ROOT,
    # On a GPU this process has taken most of the memory already.
    env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("code", [_param(code) for code in _blocks("python")])
def test_python_examples_run(code):
  _run("-c", code)


def test_all_python_examples_are_found():
  assert len(_blocks("python")) == 3


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
  named = {call[0] for call in _commands("make")}
  named |= set(re.findall(r"`make ([a-z]+)", TEXT))
  assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("call", _commands("paged-jax"), ids=" ".join)
def test_command_options_exist(call, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([call[0], "--help"])
  assert end.value.code == 0
  known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
  assert {word for word in call if word.startswith("--")} <= known


def test_files_named_in_the_layout_exist():
  (layout,) = _blocks("text")
  folder = Path()
  for line in layout.splitlines():
    name = line.split()[0]
    if not line.startswith(" "):
      folder = Path(name)
    path = Path(name) if not line.startswith(" ") else folder / name
    assert (ROOT / path).exists(), path


def test_result_files_that_are_named_exist():
  named = set(re.findall(r"benchmarks/results/[\w./]+\w", TEXT))
  assert len(named) >= 8
  assert not [name for name in named if not (ROOT / name).exists()]


CASES = {
  "64 x 8k": "b64_8k",
  "64 x 8k, pages of 64": "b64_8k_p64",
  "64 x 2k": "b64_2k",
  "256 x 1k": "b256_1k",
  "128, 128 to 16k": "ragged128",
  "16 x 32k": "b16_32k",
  "1 x 128k": "b1_128k",
  "8 x 4k": "b8_4k",
  "1 x 8k": "b1_8k",
  "64 x 4k, 32 KV heads": "b64_4k_mha",
  "64 x 4k, 1 KV head": "b64_4k_mqa",
}
PREFILL_CASES = {
  "1 x 4k": "b1_4k",
  "4 x 4k": "b4_4k",
  "1 x 16k": "b1_16k",
  "8 x 1k": "b8_1k",
  "8 x 512 on 4k": "b8_512on4k",
  "1 x 4k, 32 KV heads": "b1_4k_mha",
}
RIVAL = "flashinfer.append_paged_kv_cache"
SIDES = ("ours", "fi_", "jax_cudnn_paged", "jax_builtin")
PREFILL_SIDES = ("ours", "fi_", "gather_cudnn", "jax_cudnn")


def _result(name):
  """What was measured on an H200."""
  path = ROOT / f"benchmarks/results/h200/{name}.json"
  return json.loads(path.read_text())


def _records(value):
  """All objects with a type in a JSON value."""
  if isinstance(value, dict):
    if "type" in value:
      yield value
    value = list(value.values())
  if isinstance(value, list):
    for each in value:
      yield from _records(each)


def _best(records, case, side, unit):
  """Microseconds and speed of the fastest kernel of a side, or None."""
  return min(
    (
      (r["us"], r[unit])
      for r in records
      if r["type"] == "time"
      and r["case"] == case
      and r["peer"].startswith(side)
    ),
    default=None,
  )


def _ceiling(records):
  """GB/s at which a run read random pages."""
  (ceiling,) = (r["GBps"] for r in records if "4 KB" in r.get("name", ""))
  return ceiling


def test_decode_figures_are_those_of_the_results():
  words = " ".join(TEXT.split())
  records = list(_records(_result("rivals")))
  again = list(_records(_result("rivals_flashinfer")))
  ceiling = _ceiling(records)
  longs = {r["case"]: r for r in _result("decode_long_batches")["cases"]}
  assert f"{ceiling:.0f} GB/s at which" in words
  assert f"reads such pages at {_ceiling(again):.0f} GB/s" in words
  ratios = []
  for label, case in CASES.items():
    cells = []
    for side in SIDES:
      us, speed = _best(records, f"d_{case}", side, "GBps")
      cells.append(f"{us:.0f} ({100 * speed / ceiling:.0f} %)")
    us = longs[f"d_{case}"]["us"]
    cells.insert(1, f"{us:.0f}")
    assert f"| {label} | {' | '.join(cells)} |" in TEXT
    ratios.append(us / _best(again, f"d_{case}", "fi_", "GBps")[0])
  span = f"{min(ratios):.2f} and {max(ratios):.2f} times what FlashInfer's"
  assert f"takes between {span}" in words
  # How much later the host learns of the end of a batch than of a long one.
  longer, late, a_call = [], [], []
  for short in again:
    long = longs.get(short.get("case"))
    if short["type"] == "time" and short["peer"] == "ours" and long:
      longer.append(long["n"] / short["n"])
      a_call.append((short["us"] - long["us"]) / (1 - 1 / longer[-1]))
      late.append(a_call[-1] * short["n"] / 1000)
  bounds = lambda x, digits: f"{min(x):.{digits}f} to {max(x):.{digits}f}"
  assert f"with batches {bounds(longer, 0)} times as long" in words
  span = f"{bounds(late, 1)} ms late, {bounds(a_call, 0)} us a call"
  assert f"learns it {span}" in words


def test_prefill_figures_are_those_of_the_results():
  runs = [
    list(_records(_result(name))) for name in ("rivals", "rivals_flashinfer")
  ]
  most, again = (
    f"{r['TFLOPs']:.0f}"
    for records in runs
    for r in records
    if "8192^3" in r.get("name", "")
  )
  text = f"reaches {most} in the first run and {again} in the second."
  assert text in " ".join(TEXT.split())
  columns = [(runs[0], side) for side in PREFILL_SIDES]
  columns += [(runs[1], side) for side in PREFILL_SIDES[:2]]
  for label, case in PREFILL_CASES.items():
    cells = [
      f"{best[0]:.0f} ({best[1]:.0f})" if best else ""
      for records, side in columns
      for best in [_best(records, f"p_{case}", side, "TFLOPs")]
    ]
    assert f"| {label} | {' | '.join(cells)} |" in TEXT


def test_figures_of_options_and_mixtures_are_those_of_the_results():
  words, decode = " ".join(TEXT.split()), _result("decode")
  us = lambda side: side["us"]["median"]
  narrow = decode["quantised"]
  int8, fp8 = us(narrow["int8"]), us(narrow["float8_e4m3fn"])
  wide = f"where bfloat16 takes {us(narrow['bfloat16']):.0f},"
  assert f"take {int8:.0f} and {fp8:.0f} us for 64 x 8k {wide}" in words
  assert f"loop itself takes {us(decode['loop_alone']):.0f}." in words
  pages = decode["page_sizes"]["same"].values()
  span = f"({max(map(us, pages)):.0f} to {min(map(us, pages)):.0f} us"
  assert span in words
  window = decode["window"]["window of 131072 tokens"]
  assert f"({window['more_than_plain_percent']:.0f} % more than" in words
  share = _result("prefill")["mixed"]["mixed"]["mixed_to_sum"]
  assert f"take {share:.3f} times what the chunks take" in words
  sides = _result("cascade")["cases"]["128 x 32k + 256"]["sides"]
  ours, paged, rival = (
    f"{us(sides[name]):,.0f}" for name in ("cascade", "paged", "FlashInfer")
  )
  assert f"{ours} us by `cascade_attention`, {paged} by" in words
  assert f"and {rival} by FlashInfer's cascade" in words


def test_figures_of_prefill_and_writes_are_those_of_the_results():
  words = " ".join(TEXT.split())
  prefill, batches = _result("prefill"), _result("kv_write")["write"]
  side, most = prefill["model"]["8192"], prefill["ceiling"]["tflop_per_s"]
  assert f"{side['tokens_per_s']:,.0f} tokens/s in chunks of 8,192" in words
  share = f"{side['percent_of_ceiling']:.1f} % of the {most:.0f} at"
  assert f"{side['tflop_per_s']:.0f} TFLOP/s, {share}" in words

  def us(count, *names):
    sides = batches[f"{count} tokens"]
    return [f"{sides[name]['us']['median']:.2f}" for name in names]

  others = "bfloat16, xla", RIVAL, "plain copy"
  ours, xla, rival, copy = us(64, "bfloat16, mosaic_gpu", *others)
  assert f"{ours} us for 64 tokens, where scatters of XLA take {xla}" in words
  assert f"append {rival} and a plain copy of the bytes {copy};" in words
  ours, *several, copy = us(8192, "bfloat16, mosaic_gpu", *others)
  several = f"{', '.join(several)} and {copy}."
  assert f"{ours} us for 8,192 tokens, where they take {several}" in words
  for way, text in (
    ("mosaic_gpu", "takes {} and {} us"),
    ("xla", "XLA {} and {}"),
  ):
    both = [us(count, f"int8, {way}")[0] for count in (64, 8192)]
    assert text.format(*both) in words
