"""What kernels know of the GPU that they are made for."""

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend import backend

WARPS = 4  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A kind of GPU."""

  kind: str = ""  # as JAX names it, "NVIDIA H200"
  num_sms: int = 132  # multiprocessors: those of an H200, or an H100 SXM


def at_hand() -> Gpu:
  """Returns the default device, or one of no name where it is no GPU.

  A kernel can be lowered without a GPU, and it runs on any number of
  multiprocessors, best on that which it is made for.
  """
  device = backend.get_default_device()
  if device.platform != "gpu":
    return Gpu()
  num_sms = getattr(device, "core_count", None)
  return Gpu(device.device_kind, num_sms or Gpu.num_sms)


def follow_closely() -> None:
  """Waits for the kernel before, while this one is launched already.

  In a kernel, before it reads or writes memory of the GPU. The kernel after, if
  it does the same, is launched while this one runs.
  """
  plgpu.griddepcontrol_launch_dependents()
  plgpu.griddepcontrol_wait()
