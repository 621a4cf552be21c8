"""Programmatic dependent launch (PDL) of consecutive kernels."""

import jax.experimental.pallas.mosaic_gpu as plgpu


def overlap_with_previous_kernel() -> None:
  """Waits in a kernel for the kernel before, which launched it early.

  To be called before the kernel reads or writes global memory. It also lets
  the next kernel launch while this one still runs.
  """
  plgpu.griddepcontrol_launch_dependents()
  plgpu.griddepcontrol_wait()
