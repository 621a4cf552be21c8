"""Matrix products by the tensor cores of Hopper (wgmma), in f32.

The interpreter has no wgmma that starts from a given accumulator or takes an
operand from registers: there, plain products take its place.
"""

from typing import cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array


def full_tile(value: float, shape: tuple[int, int]):
  """Returns a tile of one value, in the layout of wgmma."""
  return plgpu.layout_cast(
    jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA
  )


def matmul(operands):
  """Returns the sum of products a @ b of operands in shared memory.

  Args:
    operands: Pairs (a, b).
  """

  def issue(acc):
    for a, b in operands:
      plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(issue, accumulator_of(operands))


def accumulator_of(operands):
  """Returns an accumulator for the products of operands."""
  (a, b), *_ = operands
  return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def accumulate(acc, a, b, *, interpreted: bool):
  """Returns acc + a @ b, without a second accumulator.

  Args:
    acc: In f32.
    a: The left operand, in shared memory or in registers.
    b: The right operand, in shared memory.
    interpreted: Whether an interpreter runs it.
  """
  if interpreted:
    in_registers = isinstance(a, jax.Array)
    return acc + (plain_product(a, b) if in_registers else matmul([(a, b)]))
  return cast(
    Array,
    pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc)),
  )


def plain_product(a, b):
  """Returns a @ b without wgmma."""
  return a[...].astype(jnp.float32) @ b[...].astype(jnp.float32)
