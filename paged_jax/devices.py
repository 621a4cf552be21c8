"""The default device: whether it runs the kernels, and its free memory."""

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
  """Returns the free memory of `device` in bytes, or None if it is unknown."""
  stats = device.memory_stats()
  if stats is not None and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  if device.platform != "cpu":
    return None
  try:
    with open("/proc/meminfo", encoding="ascii") as lines:
      fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None
