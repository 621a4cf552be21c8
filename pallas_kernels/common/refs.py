"""Declares the outputs and the scratch memory of kernels.

A kernel body gets references in the pytrees in which its launcher had arrays
and declarations. The functions here are typed as the references that their
declarations become.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.common.types import Ref


def output(shape: tuple[int, ...], dtype: DTypeLike) -> Ref:
  """Declares an array in global memory that the kernel writes."""
  return jax.ShapeDtypeStruct(shape, dtype)


def smem(
  shape: tuple[int, ...],
  dtype: DTypeLike,
  transforms: tuple[plgpu.TilingTransform | plgpu.SwizzleTransform, ...] = (),
) -> Ref:
  """Declares shared memory of a program."""
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def barrier(num_arrivals: int = 1, num_barriers: int | None = None) -> Ref:
  """Declares a barrier of a program, or an array of them."""
  shape = () if num_barriers is None else (num_barriers,)
  return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=shape)
