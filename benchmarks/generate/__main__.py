"""Compares greedy generation of the demo model with Hugging Face transformers.

Both use the same GGUF weights, dequantised to float32, the same prompts and the
same number of new tokens. They run alternately, in separate processes, several
times. The results are ratios: of tokens per second of whole calls, including
prefill but not compilation or loading, and of peak resident memory.

transformers needs its own environment; give the path of its interpreter:

  python -m benchmarks.generate --rival-python /path/to/bin/python
  (in that environment: pip install torch transformers accelerate gguf)

Without it, only paged_jax is timed, and no results are written. Results:
benchmarks/results/cpu/generate.json
"""

import json
import os
import pathlib
import subprocess
import sys

from benchmarks.harness import command, results
from benchmarks.harness.timing import spread
from paged_jax.checkpoints import demo

ROOT = pathlib.Path(__file__).parent.parent.parent
BATCHES = (1, 8)
PROMPT_LEN = 64
NUM_NEW = 128
ROUNDS = 2
CALLS = 3  # timed calls of a round, after a warm-up call


def main() -> None:
  """Times both sides in turn and writes the record."""
  parser = command.parser("generate", __doc__)
  parser.add_argument("--model", default="demo", help="`demo` or a GGUF file")
  parser.add_argument("--rival-python", help="interpreter with transformers")
  args = parser.parse_args()
  path = str(demo.resolve(args.model).absolute())
  sides = {"paged_jax": sys.executable}
  if args.rival_python:
    sides["transformers"] = args.rival_python
  record = {"settings": _settings(pathlib.Path(path).name), "batches": {}}
  for batch in BATCHES:
    runs = {side: [] for side in sides}
    for _ in range(ROUNDS):
      for side, python in sides.items():
        runs[side].append(_run(python, side, path, batch))
        print(batch, side, _summary(runs[side][-1]), flush=True)
    record["batches"][batch] = _compare(runs)
    record["environment"] = {s: runs[s][0]["environment"] for s in sides}
  print(json.dumps(record["batches"], indent=1))
  if args.rival_python:
    print("written to", results.save("cpu", "generate", record))


def _settings(model: str) -> dict:
  return dict(
    model=model,
    prompt_len=PROMPT_LEN,
    num_new=NUM_NEW,
    dtype="float32",
    rounds=ROUNDS,
    calls=CALLS,
    tokens_per_s="batch * num_new / seconds of a whole call",
    peak_mb="resident memory at its highest during the calls",
  )


def _run(python: str, side: str, path: str, batch: int) -> dict:
  """Runs one side in its own process, and returns its figures."""
  call = [python, "-m", "benchmarks.generate.side", side, path, str(batch)]
  sizes = [str(n) for n in (PROMPT_LEN, NUM_NEW, CALLS)]
  run = subprocess.run(
    call + sizes,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  if run.returncode:
    raise RuntimeError(f"{side} failed:\n{run.stderr}")
  return json.loads(run.stdout.splitlines()[-1])


def _summary(run: dict) -> dict:
  return {k: run[k] for k in ("tokens_per_s", "peak_mb")}


def _compare(runs: dict[str, list[dict]]) -> dict:
  result: dict = {}
  for side, each in runs.items():
    speeds = [speed for run in each for speed in run["tokens_per_s"]]
    result[side] = {
      "tokens_per_s": spread(speeds),
      "peak_mb": spread([run["peak_mb"] for run in each]),
    }
  if "transformers" in runs:
    ours, theirs = result["paged_jax"], result["transformers"]
    tokens = [runs[side][0]["token_ids"] for side in runs]
    if tokens[0] != tokens[1]:
      raise RuntimeError(f"the sides disagree: {tokens}")
    result["ratio"] = {
      key: ours[key]["median"] / theirs[key]["median"] for key in ours
    }
  return result


if __name__ == "__main__":
  main()
