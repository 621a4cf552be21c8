"""The GPU that tile sizes are chosen for. Imports no Pallas."""

import dataclasses

from jax.extend import backend

WARPS = 4  # warps per warpgroup


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU model."""

  kind: str = ""  # JAX's `device_kind`, for example "NVIDIA H200"
  num_sms: int = 132  # multiprocessors; the default fits H200 and H100 SXM


def default_gpu() -> Gpu:
  """Returns the default device, or `Gpu()` if the default device is no GPU.

  Kernels can be lowered without a GPU. They run on any number of
  multiprocessors, and run best on the number that they were sized for.
  """
  device = backend.get_default_device()
  if device.platform != "gpu":
    return Gpu()
  num_sms = getattr(device, "core_count", None)
  return Gpu(device.device_kind, num_sms or Gpu.num_sms)
