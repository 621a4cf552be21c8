"""Tests of the benchmark of many queries."""

import dataclasses
import json
import sys

import jax
import pytest

from benchmarks.harness import cases
from benchmarks.harness.attention import loop_inputs
from benchmarks.ragged import __main__ as bench_ragged

SMALL_CASES = bench_ragged.SMALL_CASES


@pytest.fixture(autouse=True)
def usual_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_every_config_of_a_case_is_timed_and_failures_show(name):
  case = SMALL_CASES[name]
  sides = json.loads(json.dumps(bench_ragged.timed(case, small=True)))
  assert list(sides) == list(map(str, bench_ragged.configs(case)))
  assert not cases.failures(sides)
  for side in sides.values():
    assert side["relative_error"] < 1e-2
    flops = 1e6 * side["tflop_per_s"] * side["us"]["median"]
    assert flops == pytest.approx(case.flops)
  sides[str(bench_ragged.configs(case)[0])] = {"error": "none"}
  assert cases.failures(sides)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_the_kernel_takes_what_plain_jax_takes(name):
  case = SMALL_CASES[name]
  batch = bench_ragged.make(case)
  k_pages, v_pages, kv_lens, tables, *more = loop_inputs(batch)
  args = batch.q, k_pages, v_pages, kv_lens, tables[0], *more
  (config, *_) = bench_ragged.configs(case)
  out = jax.eval_shape(bench_ragged.kernel(case, config), *args)
  assert out == jax.eval_shape(bench_ragged.plain(case), *args)
  assert out.shape == batch.q.shape


@pytest.mark.slow
def test_what_fails_is_named_and_the_others_are_timed(monkeypatch, capsys):
  small = SMALL_CASES["small, int8"]
  wrong = dataclasses.replace(small, kv_dtype="int4")
  cases = {"small": small, "wrong": wrong}
  monkeypatch.setattr(bench_ragged, "SMALL_CASES", cases)
  monkeypatch.setattr(sys, "argv", ["ragged", "--small"])
  with pytest.raises(SystemExit, match="^failed: wrong$"):
    bench_ragged.main()
  _, timed, failed = capsys.readouterr().out.splitlines()
  assert "TFLOP/s" in timed
  assert "ValueError" in failed


def test_several_configs_are_timed_where_it_was_asked_for():
  several = [
    name
    for name, case in bench_ragged.CASES.items()
    if len(bench_ragged.configs(case)) > 1
  ]
  assert several == ["1 x 4k", "1 x 16k", "8 x 512 on 4k", "1 x 512 on 128k"]
