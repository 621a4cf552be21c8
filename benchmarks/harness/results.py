"""Describes the machine of a run, and writes its results.

Imports nothing but the standard library: rivals use it in environments of their
own.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def environment(packages: list[str], *, on_cpu: bool) -> dict:
  """Returns the machine and the package versions of a run.

  Args:
    packages: Names of the packages whose versions are recorded.
    on_cpu: Whether the CPU is timed instead of the GPU.
  """
  versions: dict[str, str | None] = {}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    "device": cpu_name() if on_cpu else gpu_name(),
    "python": platform.python_version(),
    "versions": versions,
  }


def keep(
  name: str,
  records: Iterable[dict],
  args: argparse.Namespace,
  environment: dict,
) -> dict:
  """Writes the record after each case, so an interrupted run keeps its figures.

  With `--small`, nothing is written.

  Args:
    name: Name of the benchmark.
    records: The record with all figures so far, after each case.
    args: Arguments, as returned by `command.start_on_gpu`.
    environment: Environment, as returned by `command.start_on_gpu`.

  Returns:
    The last record.
  """
  record, path = {}, None
  for record in records:
    if not args.small:
      path = save("h200", name, {"environment": environment} | record, args.out)
  if path is not None:
    print("written to", path)
  return record


def cpu_name() -> str:
  """Returns the processor's name and the number of its cores."""
  name, cores = platform.processor() or "CPU", 0
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return name
  for line in text.splitlines():
    key, _, value = line.partition(":")
    if key.strip() == "model name":
      name, cores = value.strip(), cores + 1
  return f"{name}, {cores} cores"


def gpu_name() -> str | None:
  """Returns the GPU's name and driver, or None without one."""
  query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv"]
  try:
    run = subprocess.run(
      [*query, "-i", "0"], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return run.stdout.splitlines()[-1]


def save(
  folder: str, name: str, record: dict, results: pathlib.Path = RESULTS
) -> pathlib.Path:
  """Writes a record as JSON, and returns its path.

  Args:
    folder: Folder of the device, below `results`.
    name: Name of the benchmark.
    record: The record.
    results: Folder that contains the folders of the devices.
  """
  path = results / folder / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  # Replaced at once, so that the file is complete if the run is interrupted.
  part = path.with_suffix(".part")
  part.write_text(json.dumps(record, indent=1) + "\n")
  part.replace(path)
  return path
