"""The command line of a benchmark: its arguments and its exit status."""

import argparse
import json
import pathlib
import sys

import jax

from benchmarks.harness.results import RESULTS, environment


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """Returns the argument parser of a benchmark.

  Args:
    name: Name of the benchmark.
    doc: Module docstring of the benchmark; its first line is shown.
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
  """Parses the arguments of a GPU benchmark, and prints its environment.

  Exits with an error without a GPU, unless `--small` is given.

  Args:
    name: Name of the benchmark.
    doc: Module docstring of the benchmark.
    packages: Names of the packages whose versions are recorded.
    flags: Help texts of further options without a value, by name.
    values: Help texts of further arguments with a value, by name. Names that
      start with a dash are optional.

  Returns:
    The arguments `small` and `out` and those in `flags` and `values`, and the
    environment, as returned by `results.environment`.
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
  """Exits with an error if any case has failed."""
  if failed:
    sys.exit(f"failed: {'; '.join(failed)}")
