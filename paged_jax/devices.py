"""What the machine at hand can run, and what of it is chosen."""

from collections.abc import Callable

import jax
from jax.extend import backend

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


def default_device() -> jax.Device:
  """Returns the device on which jit runs unless told otherwise."""
  return backend.get_default_device()


def why_not_hopper() -> str | None:
  """Returns why the Mosaic GPU kernels do not run here, or None if they do."""
  device = default_device()
  if device.platform not in ("gpu", "cuda"):
    return f"the default device is {device.device_kind!r}, not an NVIDIA GPU."
  capability = getattr(device, "compute_capability", "unknown")
  if capability != "9.0":
    return (
      f"{device.device_kind!r} has compute capability {capability}, and the "
      "kernels multiply with wgmma, which only Hopper (9.0) has."
    )
  return None


def choose(
  implementation: str | None,
  why_not: Callable[[], str | None],
  *,
  by_default: bool = True,
) -> str:
  """Returns the implementation of an op to take.

  Args:
    implementation: What the caller names; None to choose.
    why_not: Returns why the kernel cannot serve, or None.
    by_default: Whether None takes the kernel where it can serve. A kernel that
      was not measured on a GPU, or was slower, waits for being named.

  Raises:
    ValueError: If there is no such implementation.
    NotImplementedError: If it is the kernel, and it cannot serve.
  """
  check_implementation(implementation)
  if implementation == "xla" or (implementation is None and not by_default):
    return "xla"
  reason = why_not()
  if implementation is None:
    return "mosaic_gpu" if reason is None else "xla"
  if reason is not None:
    raise NotImplementedError(f"{implementation=} is not available: {reason}")
  return implementation


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError if there is no such implementation."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} must be None or one of {IMPLEMENTATIONS}."
    )


def free_bytes(device: jax.Device) -> int | None:
  """Returns the memory that can still be allocated on `device`, in bytes.

  None where the platform does not say.
  """
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
