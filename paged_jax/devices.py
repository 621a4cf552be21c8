"""The default device: whether it runs the kernels, and its free memory."""

from pathlib import Path

import jax
from jax.extend import backend


def default_device() -> jax.Device:
  """Returns the device on which jit runs by default."""
  return backend.get_default_device()


def why_not_hopper() -> str | None:
  """Returns why the default device cannot run the kernels; None if it can."""
  device = default_device()
  if device.platform not in ("gpu", "cuda"):
    return f"the default device is {device.device_kind!r}, not an NVIDIA GPU."
  capability = getattr(device, "compute_capability", "unknown")
  if capability != "9.0":
    return (
      f"{device.device_kind!r} has compute capability {capability}; the "
      "kernels use wgmma instructions, which only Hopper (9.0) has."
    )
  return None


def free_bytes(device: jax.Device) -> int | None:
  """Returns the free memory of `device` in bytes, or None if it is unknown.

  For a CPU, it is the least of what the machine has and of what the limits of
  the process's container leave.
  """
  stats = device.memory_stats()
  if stats is not None and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  if device.platform != "cpu":
    return None
  known = [free_of_machine(), free_of_container()]
  return min((free for free in known if free is not None), default=None)


def free_of_machine(root: Path = Path("/")) -> int | None:
  """Returns the free memory of the machine in bytes, or None if unknown.

  Args:
    root: Folder that contains /proc.
  """
  try:
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None


def free_of_container(root: Path = Path("/")) -> int | None:
  """Returns what the memory limits of the process leave, or None without any.

  Reads control groups of version 1 and 2. The limit of a group holds for all
  groups below it. Cached files do not count as used: they make room.

  Args:
    root: Folder that contains /proc and /sys.
  """
  free = []
  for group in _memory_groups(root):
    for limit, usage, cached in (
      ("memory.max", "memory.current", "inactive_file"),
      ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
      most, used = _number(group / limit), _number(group / usage)
      # Version 1 has a number near 2**63 for no limit.
      if most is not None and used is not None and most < 2**60:
        free.append(max(0, most - used + _cached(group, cached)))
  return min(free, default=None)


def _memory_groups(root: Path) -> list[Path]:
  """Returns the folders of the control groups of memory, and those above."""
  try:
    lines = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return []
  groups = []
  for line in lines:  # number:controllers:path
    _, controllers, path = line.split(":", 2)
    if controllers and "memory" not in controllers.split(","):
      continue
    top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
    # In a container, its own group may be the top.
    below = top / path.strip("/")
    chain = below, *below.parents
    groups += [each for each in chain if each.is_relative_to(top)]
  return groups


def _number(path: Path) -> int | None:
  try:
    return int(path.read_text())
  except (OSError, ValueError):  # "max" is no limit
    return None


def _cached(group: Path, name: str) -> int:
  try:
    lines = (group / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])
  except (OSError, KeyError, ValueError):
    return 0
