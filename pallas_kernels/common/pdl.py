"""Programmatic dependent launch (PDL) of consecutive kernels.

With PDL, a kernel may start while the previous kernel on the stream still runs.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu


def overlap_with_previous_kernel() -> None:
  """Allows the next kernel to launch now, then waits for the previous one.

  A kernel body calls this before it reads or writes global memory.
  """
  plgpu.griddepcontrol_launch_dependents()
  plgpu.griddepcontrol_wait()
