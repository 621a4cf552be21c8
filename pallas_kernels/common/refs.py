"""Declares the outputs, shared memory and barriers of kernels.

A launcher passes pytrees of arrays and of declarations. The kernel body
receives the same pytrees with a reference in each place. The functions here
return declarations, but are annotated with the type that the body sees.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.common.types import Ref


def output(shape: tuple[int, ...], dtype: DTypeLike) -> Ref:
  """Declares an output array in global memory.

  Args:
    shape: Shape of the array.
    dtype: Its dtype.
  """
  return jax.ShapeDtypeStruct(shape, dtype)


def smem(
  shape: tuple[int, ...],
  dtype: DTypeLike,
  transforms: tuple[plgpu.TilingTransform | plgpu.SwizzleTransform, ...] = (),
) -> Ref:
  """Declares a buffer in the shared memory of a program.

  Args:
    shape: Shape of the buffer.
    dtype: Its dtype.
    transforms: Its layout; () is row-major.
  """
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def barrier(num_arrivals: int = 1, num_barriers: int | None = None) -> Ref:
  """Declares a barrier of a program, or an array of barriers.

  Args:
    num_arrivals: Arrivals that complete a phase of the barrier.
    num_barriers: Length of the array; None for a single barrier.
  """
  shape = () if num_barriers is None else (num_barriers,)
  return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=shape)
