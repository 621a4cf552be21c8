"""Ragged: the streaming softmax in registers. Queries are rows, keys columns.

The transpose of decode's: many queries fill the 64 rows of wgmma, so that P
stays in registers as the left operand of P V. The state of each row is that of
`base2`.

m is about the greatest score: a tile may have scores that exceed it by `_SLACK`
before it grows. Sums are then up to 2^_SLACK larger, which floats hold, and acc
is seldom multiplied.
"""

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Float

from pallas_kernels.common import base2, wgmma
from pallas_kernels.common.base2 import Softmax, or_zero

_STORE_IF_NEGATIVE = """{
  .reg .pred never;
  .reg .b32 nowhere;
  mov.b32 nowhere, 0;
  setp.lt.f32 never, $0, 0f00000000;
  @never st.shared.f32 [nowhere], $0;
}"""

_SLACK = 8.0  # in base 2: P is at most 256, which float16 holds

QUERIES = plgpu.Layout.WGMMA.reduce(1)


class RunningSoftmax(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Float[Array, "rows head_dim"]
  m: Float[Array, " rows"]
  l: Float[Array, "rows 8"]


def init(rows: int, head_dim: int) -> Softmax:
  """Returns the softmax over no keys."""
  vector = lambda value: plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), QUERIES
  )
  acc = wgmma.full_tile(0.0, (rows, head_dim))
  return Softmax(acc, vector(-jnp.inf), vector(0.0))


def across(values, shape: tuple[int, ...]):
  """Returns values of queries, repeated along a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def weigh(m, l, s, factor: float):
  """Returns m, l, the factor of acc, and P, when a tile is folded in.

  Threads share a row, so l is kept apart for each of their columns, modulo 8,
  and summed once, at the end.

  Args:
    m: The greatest score so far.
    l: f32[rows, 8], the sum so far.
    s: Scores of a tile, which times `factor` are in base 2.
    factor: Not negative.
  """
  top = s.max(axis=1) * factor
  old_m, m = m, jnp.where(top > m + _SLACK, top, m)
  shift = or_zero(m)
  p = jnp.exp2(s * factor - across(shift, s.shape))
  alpha = jnp.where(m == old_m, 1.0, jnp.exp2(old_m - shift))
  width = l.shape[1]
  sums = (p[:, i : i + width] for i in range(0, s.shape[1], width))
  l = l * across(alpha, l.shape) + functools.reduce(jnp.add, sums)
  return m, l, alpha, p


def rescale(acc, alpha, *, interpreted: bool):
  """Returns acc times a factor for each row, which is 1 for most of them."""
  # Warps may diverge here: nothing in the branches synchronises them.
  return lax.cond(
    jnp.any(alpha != 1.0) if interpreted else _differs_from_one(alpha),
    lambda acc: acc * across(alpha, acc.shape),
    lambda acc: acc,
    acc,
  )


def _differs_from_one(alpha):
  """Returns whether some row of the warp has another factor than 1."""

  @plgpu.inline_mgpu(
    arg_types=(QUERIES,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT),
  )
  def vote(_, alpha):
    one = mgpu.c(1.0, ir.F32Type.get())
    unequal = arith.CmpFPredicate.UNE
    registers = map(_first, alpha.registers.flat)
    each = [arith.cmpf(unequal, register, one) for register in registers]
    differs: Any = functools.reduce(arith.ori, each)
    everyone: Any = mgpu.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
    differs = nvvm.vote_sync(everyone, differs, "any")
    return mgpu.FragmentedArray.splat(differs, (), is_signed=False)

  return vote(alpha)


def _first(register):
  zero: Any = mgpu.c(0, ir.IntegerType.get_signless(32))
  return llvm.extractelement(register, zero)


def merge(a: Softmax, b: Softmax) -> Softmax:
  """Returns the softmax over the keys of both."""
  return base2.merge([a, b], _scale_rows, jnp.add, far_apart=False)


def finish(state: Softmax, sinks) -> tuple[Array, Array]:
  """Returns the output and the log-sum-exp; see `base2.finish`."""
  out, lse = base2.finish(state, sinks, _scale_rows)
  return cast(Array, out), lse


def _scale_rows(acc, factors):
  return acc * across(factors, acc.shape)


def matmul_and_accumulate(operands, acc, p, v, meanwhile, *, interpreted: bool):
  """Returns acc + p @ v, and `meanwhile(wgmma.matmul(operands))`.

  Args:
    operands: See `wgmma.matmul`; their product comes first.
    acc: f32.
    p: In registers or in shared memory.
    v: In shared memory.
    meanwhile: Called with the product while p @ v is multiplied.
    interpreted: Whether an interpreter runs it.
  """
  if interpreted:  # the interpreter cannot start from a given accumulator
    acc = wgmma.accumulate(acc, p, v, interpreted=interpreted)
    return acc, meanwhile(wgmma.matmul(operands))

  def multiply(product_ref):
    for a, b in operands:
      plgpu.wgmma(product_ref, a, b)

    def multiply_more(acc_ref):
      acc_ref[...] = acc
      plgpu.wgmma(acc_ref, p, v)
      product = plgpu.wgmma_accumulator_load(product_ref, wait_n=1)
      result = meanwhile(product)
      _keep_before(result[1])
      return acc_ref[...], result

    return pl.run_scoped(multiply_more, plgpu.ACC(acc.shape, jnp.float32))

  return pl.run_scoped(multiply, wgmma.accumulator_of(operands))


def _keep_before(l):
  """Keeps the compiler from moving the computation of l behind the wait.

  It moves whatever it can behind the wait for wgmma, and with it all of the
  softmax. A store, to an address that nobody reads, cannot be moved; it never
  happens, since l is not negative.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,))
  def pin(_, l):
    for pair, i in itertools.product(l.registers.flat, range(2)):
      place: Any = mgpu.c(i, ir.IntegerType.get_signless(32))
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [llvm.extractelement(pair, place)],
        _STORE_IF_NEGATIVE,
        "f",
        has_side_effects=True,
      )

  pin(l)
