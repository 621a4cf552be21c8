"""Streaming softmax in registers, in base 2, with queries down and keys across.

The turned one of `online_softmax`: many queries fill the 64 rows of wgmma, so
that P stays in registers as the left operand of P V. The state of each row is
m, the sum l of 2^(s - m), and acc = sum 2^(s - m) v.

m is about the greatest score: a tile may have scores that exceed it by `_SLACK`
before it grows. Sums are then up to 2^_SLACK larger, which floats do not mind,
and acc is seldom multiplied.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Float

from pallas_kernels.decode import softmax as decode_softmax
from pallas_kernels.decode.softmax import LOG2_E, or_zero

_STORE_IF_NEGATIVE = """{
  .reg .pred never;
  .reg .b32 nowhere;
  mov.b32 nowhere, 0;
  setp.lt.f32 never, $0, 0f00000000;
  @never st.shared.f32 [nowhere], $0;
}"""

_SLACK = 8.0  # in base 2: P is at most 256, which float16 holds

QUERIES = plgpu.Layout.WGMMA.reduce(1)


class State(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Float[Array, "rows head_dim"]
  m: Float[Array, " rows"]
  l: Float[Array, " rows"]


def init(rows: int, head_dim: int) -> State:
  """Returns the softmax over no keys."""
  vector = lambda value: plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), QUERIES
  )
  acc = decode_softmax.tile(0.0, (rows, head_dim))
  return State(acc, vector(-jnp.inf), vector(0.0))


def across(values, shape: tuple[int, ...]):
  """Returns values of queries, repeated along a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def weigh(m, l, s, factor: float):
  """Returns m, l, the factor of acc, and P, when a tile is folded in.

  Threads share a row, so l is kept apart for each of their columns, modulo 8,
  and summed once, at the end.

  Args:
    m: that so far.
    l: f32[rows, 8], the sum so far.
    s: scores of a tile, which times `factor` are in base 2.
    factor: not negative.
  """
  top = s.max(axis=1) * factor
  before, m = m, jnp.where(top > m + _SLACK, top, m)
  shift = or_zero(m)
  p = jnp.exp2(s * factor - across(shift, s.shape))
  alpha = jnp.where(m == before, 1.0, jnp.exp2(before - shift))
  width = l.shape[1]
  sums = (p[:, i : i + width] for i in range(0, s.shape[1], width))
  l = l * across(alpha, l.shape) + functools.reduce(jnp.add, sums)
  return m, l, alpha, p


def rescale(acc, alpha, *, interpreted: bool):
  """Returns acc times a factor for each row, which is 1 for most of them."""
  # Each warp goes its own way: nothing in the branches is for all of them.
  return lax.cond(
    jnp.any(alpha != 1.0) if interpreted else _differs_from_one(alpha),
    lambda acc: acc * across(alpha, acc.shape),
    lambda acc: acc,
    acc,
  )


def _differs_from_one(alpha):
  """Tells whether some row of the warp has another factor than 1."""

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


def merge(a: State, b: State) -> State:
  """Returns the softmax over the keys of both."""
  m = jnp.maximum(a.m, b.m)
  shift = or_zero(m)
  of_a, of_b = jnp.exp2(a.m - shift), jnp.exp2(b.m - shift)
  shape = a.acc.shape
  acc = a.acc * across(of_a, shape) + b.acc * across(of_b, shape)
  return State(acc, m, a.l * of_a + b.l * of_b)


def finish(state: State, sinks):
  """Returns the normalised output and the natural log-sum-exp.

  Args:
    state: the softmax over all keys.
    sinks: f32[rows], a logit in base 2 that only the denominator counts, or
      None. What has seen no key stays empty.
  """
  acc, m, l = state
  sees = l != 0  # NaN is no emptiness
  if sinks is not None:
    top = or_zero(jnp.maximum(m, sinks))
    alpha = jnp.exp2(m - top)
    acc *= across(alpha, acc.shape)
    l = jnp.where(sees, l * alpha + jnp.exp2(sinks - top), 0.0)
    m = top
  inverse = jnp.where(sees, 1 / l, 0.0)
  lse = jnp.where(sees, (m + jnp.log2(l)) * (1 / LOG2_E), -jnp.inf)
  return acc * across(inverse, acc.shape), lse


def matmul(operands):
  """Returns the sum of products a @ b of operands in shared memory, in f32."""

  def issue(acc):
    for a, b in operands:
      plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(issue, _product_of(operands))


def _product_of(operands):
  (a, b), *_ = operands
  return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def matmul_and_accumulate(operands, acc, p, v, meanwhile, *, interpreted: bool):
  """Returns acc + p @ v, and `meanwhile(matmul(operands))`.

  Args:
    operands: see `matmul`; their product comes first.
    acc: f32.
    p: in registers or in shared memory.
    v: in shared memory.
    meanwhile: called with the product while p @ v is multiplied.
    interpreted: whether there is no GPU.
  """
  if interpreted:  # the interpreter cannot start from a given accumulator
    acc = decode_softmax.accumulate(acc, p, v, interpreted=interpreted)
    return acc, meanwhile(matmul(operands))

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

  return pl.run_scoped(multiply, _product_of(operands))


def _keep_before(l):
  """Keeps the compiler from waiting for wgmma before l is there.

  It moves what can wait behind the wait, and with it all of the softmax. What
  may be stored, to where nobody looks, cannot; l is never negative.
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
