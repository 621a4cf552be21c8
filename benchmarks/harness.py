"""What every benchmark shares: where it ran, and where its results go."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).parent / "results"


def environment(packages: list[str], *, on_cpu: bool) -> dict:
  """Returns the machine and the versions that a result belongs to.

  Args:
    packages: Names of the packages whose versions matter.
    on_cpu: Whether the CPU was timed, and not the GPU.
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


def start_on_gpu(
  description: str,
  packages: list[str],
  *,
  on_cpu: bool,
  flags: dict[str, str] | None = None,
) -> tuple[argparse.Namespace, dict]:
  """Reads the arguments of a benchmark whose figures are of a GPU.

  Args:
    description: Of the benchmark, a line.
    packages: As for `environment`.
    on_cpu: Whether there is no GPU; it ends with an error then, but for
      `--small`.
    flags: More options, without a value, and what they are for.

  Returns:
    The arguments `small`, `out` and those of `flags`, and the environment,
    which it prints.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    "--small", action="store_true", help="try it out; nothing is written"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=RESULTS, help="folder of the results"
  )
  for name, purpose in (flags or {}).items():
    parser.add_argument(f"--{name}", action="store_true", help=purpose)
  args = parser.parse_args()
  if on_cpu and not args.small:
    parser.error("the figures are of a GPU, and there is none; try --small")
  where = environment(packages, on_cpu=on_cpu)
  print(json.dumps(where), flush=True)
  return args, where


def keep(
  name: str,
  records: Iterable[dict],
  args: argparse.Namespace,
  environment: dict,
) -> dict:
  """Writes the figures of a GPU each time that there are more of them.

  A run that is stopped so leaves what it has measured. With `--small`, nothing
  is written.

  Args:
    name: Of the benchmark.
    records: All figures so far, after each that was taken.
    args: As from `start_on_gpu`.
    environment: The same.

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
  """Returns the processor's name and how many of its cores are here."""
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


def spread(values: list[float]) -> dict[str, float]:
  """Returns minimum, median and maximum."""
  return {
    "min": min(values),
    "median": statistics.median(values),
    "max": max(values),
  }


def save(
  folder: str, name: str, record: dict, results: pathlib.Path = RESULTS
) -> pathlib.Path:
  """Writes a result as JSON, and returns its path.

  Args:
    folder: Of the device, below `results`.
    name: Of the benchmark.
    record: What to write.
    results: Where the folders of the devices are.
  """
  path = results / folder / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  # Whole, whenever the run is stopped.
  part = path.with_suffix(".part")
  part.write_text(json.dumps(record, indent=1) + "\n")
  part.replace(path)
  return path
