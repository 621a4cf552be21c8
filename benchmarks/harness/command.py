"""The command of a benchmark: its arguments, and how it ends."""

import argparse
import json
import pathlib
import sys

import jax

from benchmarks.harness.results import RESULTS, environment


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """Returns what reads the arguments of a benchmark.

  Args:
    name: Of the benchmark.
    doc: What it says about itself; its first line is shown.
  """
  return argparse.ArgumentParser(
    prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0]
  )


def start_on_gpu(
  name: str,
  doc: str,
  packages: list[str],
  *,
  flags: dict[str, str] | None = None,
  values: dict[str, str] | None = None,
) -> tuple[argparse.Namespace, dict]:
  """Reads the arguments of a benchmark whose figures are of a GPU.

  It ends with an error where there is none, but for `--small`.

  Args:
    name: As for `parser`.
    doc: The same.
    packages: As for `environment`.
    flags: More options, without a value, and what they are for.
    values: More arguments: those that start with a dash may be left out.

  Returns:
    The arguments `small`, `out` and those of `flags` and `values`, and the
    environment, which it prints.
  """
  options = parser(name, doc)
  options.add_argument(
    "--small", action="store_true", help="try it out; nothing is written"
  )
  options.add_argument(
    "--out", type=pathlib.Path, default=RESULTS, help="folder of the results"
  )
  for flag, purpose in (flags or {}).items():
    options.add_argument(f"--{flag}", action="store_true", help=purpose)
  for name_of_value, purpose in (values or {}).items():
    options.add_argument(name_of_value, help=purpose)
  args = options.parse_args()
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu and not args.small:
    options.error("the figures are of a GPU, and there is none; try --small")
  where = environment(packages, on_cpu=on_cpu)
  print(json.dumps(where), flush=True)
  return args, where


def finish(failed: list[str]) -> None:
  """Ends the process with an error if anything has failed."""
  if failed:
    sys.exit(f"failed: {'; '.join(failed)}")
