"""The GPU that kernels are sized for. Imports no Pallas."""

import dataclasses

from jax.extend import backend

WARPS = 4  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A kind of GPU."""

  kind: str = ""  # as JAX names it, "NVIDIA H200"
  num_sms: int = 132  # multiprocessors: those of an H200, or an H100 SXM


def at_hand() -> Gpu:
  """Returns the default device, or a nameless one if it is not a GPU.

  A kernel can be lowered without a GPU, and it runs on any number of
  multiprocessors, best on the number it was sized for.
  """
  device = backend.get_default_device()
  if device.platform != "gpu":
    return Gpu()
  num_sms = getattr(device, "core_count", None)
  return Gpu(device.device_kind, num_sms or Gpu.num_sms)
