"""Ragged: the online softmax in registers. Queries are rows, keys are columns.

This is the transpose of the decode softmax: many queries fill the 64 rows of
wgmma, and P stays in registers as the left operand of P V. The state of each
row is that of `base2`.

m may lag behind the maximum score: it is raised only if a score exceeds it by
more than `_SLACK`. Therefore acc is seldom rescaled, and sums are at most
2^_SLACK times larger, which is within the range of floats.
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
from pallas_kernels.common.ptx import i32

_STORE_IF_NEGATIVE = """{
  .reg .pred never;
  .reg .b32 nowhere;
  mov.b32 nowhere, 0;
  setp.lt.f32 never, $0, 0f00000000;
  @never st.shared.f32 [nowhere], $0;
}"""

_SLACK = 8.0  # in base 2: P is at most 256, which float16 holds

QUERIES = plgpu.Layout.WGMMA.reduce(1)  # layout of one value per query


class RunningSoftmax(NamedTuple):
  """The softmax state over the keys folded in so far; l is not yet reduced."""

  acc: Float[Array, "rows head_dim"]
  m: Float[Array, " rows"]
  l: Float[Array, "rows 8"]


def init(rows: int, head_dim: int) -> Softmax:
  """Returns the softmax state over no keys.

  Args:
    rows: Number of queries.
    head_dim: Elements per head.
  """
  vector = lambda value: plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), QUERIES
  )
  acc = wgmma.full_tile(0.0, (rows, head_dim))
  return Softmax(acc, vector(-jnp.inf), vector(0.0))


def across(values, shape: tuple[int, ...]):
  """Broadcasts one value per query (row) to a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def fold_scores(m, l, s, factor: float):
  """Folds the scores of a tile into m and l.

  Four threads hold a row. Therefore l has 8 partial sums per row, by column
  modulo 8, which are summed once, after the last tile.

  Args:
    m: The maximum score so far, or up to `_SLACK` less.
    l: f32[rows, 8], the partial sums so far.
    s: Scores of a tile, -inf where masked; times `factor` they are in base 2.
    factor: Positive.

  Returns:
    m, l, the factor to rescale acc, and P.
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
  """Returns acc times one factor per row, which is 1 for most rows."""
  # Each warp takes its own branch: no branch synchronises the warps.
  return lax.cond(
    jnp.any(alpha != 1.0) if interpreted else _differs_from_one(alpha),
    lambda acc: acc * across(alpha, acc.shape),
    lambda acc: acc,
    acc,
  )


def _differs_from_one(alpha):
  """Returns whether any row of the calling warp has a factor other than 1."""

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
    differs = nvvm.vote_sync(i32(0xFFFFFFFF), differs, "any")
    return mgpu.FragmentedArray.splat(differs, (), is_signed=False)

  return vote(alpha)


def _first(register):
  return llvm.extractelement(register, i32(0))


def merge(a: Softmax, b: Softmax) -> Softmax:
  """Returns the softmax state over the keys of both; see `base2.merge`."""
  return base2.merge([a, b], _scale_rows, jnp.add, far_apart=False)


def finish(state: Softmax, sinks) -> tuple[Array, Array]:
  """Returns the output and the log-sum-exp; see `base2.finish`."""
  out, lse = base2.finish(state, sinks, _scale_rows)
  return cast(Array, out), lse


def _scale_rows(acc, factors):
  return acc * across(factors, acc.shape)


def matmul_and_accumulate(
  operands, acc, p, v, overlapped, *, interpreted: bool
):
  """Returns acc + p @ v, and `overlapped(wgmma.matmul(operands))`.

  Args:
    operands: See `wgmma.matmul`; their product is issued first.
    acc: f32.
    p: Left operand, in registers or in shared memory.
    v: Right operand, in shared memory.
    overlapped: Called with the product of `operands`, while wgmma computes
      p @ v.
    interpreted: Whether the interpreter runs the kernel.
  """
  if interpreted:  # the interpreter cannot start from a given accumulator
    acc = wgmma.accumulate(acc, p, v, interpreted=interpreted)
    return acc, overlapped(wgmma.matmul(operands))

  def multiply(product_ref):
    for a, b in operands:
      plgpu.wgmma(product_ref, a, b)

    def multiply_more(acc_ref):
      acc_ref[...] = acc
      plgpu.wgmma(acc_ref, p, v)
      product = plgpu.wgmma_accumulator_load(product_ref, wait_n=1)
      result = overlapped(product)
      _pin_before_wait(result[1])
      return acc_ref[...], result

    return pl.run_scoped(multiply_more, plgpu.ACC(acc.shape, jnp.float32))

  return pl.run_scoped(multiply, wgmma.accumulator_of(operands))


def _pin_before_wait(l):
  """Keeps the compiler from sinking the softmax below the wait for wgmma.

  A store cannot be moved across the wait, so neither can the computation of l,
  which it depends on. Its predicate is never true, because l is not negative.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,))
  def pin(_, l):
    for pair, i in itertools.product(l.registers.flat, range(2)):
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [llvm.extractelement(pair, i32(i))],
        _STORE_IF_NEGATIVE,
        "f",
        has_side_effects=True,
      )

  pin(l)
