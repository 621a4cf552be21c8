"""Matrix products by Hopper's tensor cores (wgmma), accumulated in f32.

The interpreter supports neither wgmma with an initial accumulator nor wgmma
with an operand in registers. There, plain products replace both.
"""

from typing import cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array


def full_tile(value: float, shape: tuple[int, int]):
  """Returns an f32 tile filled with one value, in the layout of wgmma.

  Args:
    value: The value.
    shape: Shape of the tile; the rows are a multiple of 64.
  """
  return plgpu.layout_cast(
    jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA
  )


def matmul(operands):
  """Returns the sum of the products a @ b of operands in shared memory.

  Args:
    operands: Pairs (a, b), one or more.

  Returns:
    f32[a.shape[0], b.shape[1]].
  """

  def issue(acc):
    for a, b in operands:
      plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(issue, accumulator_of(operands))


def accumulator_of(operands):
  """Returns the type of an accumulator for `matmul(operands)`.

  Args:
    operands: See `matmul`.
  """
  (a, b), *_ = operands
  return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def accumulate(acc, a, b, *, interpreted: bool):
  """Returns acc + a @ b, accumulated in place.

  Args:
    acc: f32, in registers.
    a: The left operand, in shared memory or in registers.
    b: The right operand, in shared memory.
    interpreted: Whether the interpreter runs the kernel.
  """
  if interpreted:
    in_registers = isinstance(a, jax.Array)
    return acc + (plain_product(a, b) if in_registers else matmul([(a, b)]))
  return cast(
    Array,
    pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc)),
  )


def plain_product(a, b):
  """Returns a @ b in f32 without wgmma.

  Args:
    a: Left operand, a reference or an array.
    b: Right operand, a reference or an array.
  """
  return a[...].astype(jnp.float32) @ b[...].astype(jnp.float32)
