"""Streaming softmax in registers, in base 2, with keys down and queries across.

Scores of a tile are S = K Q^T: a row for each key, a column for each query.
Decode has few queries, and wgmma wants 64 rows but is content with 8 columns.
The state of each column: the greatest score m, the sum l of 2^(s - m), and
acc = sum 2^(s - m) v, which is a column of V^T P. A tile is folded in by

  m' = max(m, max s)    l' = 2^(m - m') l + sum 2^(s - m')
  acc' = 2^(m - m') acc + V^T 2^(s - m')

Masked scores are -inf. While a column has seen only those, m is -inf, and 0 is
subtracted in its place, so that it stays empty instead of turning into NaN.

Where values have scales, m is the greatest of s + log2 scale, and so are the
exponents of P; l still sums 2^(s - m).

Sums over keys cross the warps, so l is kept apart for each row of the tiles,
and summed once, at the end.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

STEEPEST = 2.0**95  # slope of ALiBi: times any distance it is a number
LOG2_E = math.log2(math.e)


type Blocks = tuple[Float[Array, "rows num_queries"], ...]  # see `row_blocks`


class State(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Blocks
  m: Float[Array, " num_queries"]
  l: Float[Array, "block_kv num_queries"]


class Summed(NamedTuple):
  """The same, with l summed over the rows: f32[num_queries]."""

  acc: Blocks
  m: Float[Array, " num_queries"]
  l: Float[Array, " num_queries"]


def row_blocks(head_dim: int) -> tuple[tuple[int, int], ...]:
  """Returns the start and size of the blocks of rows of acc.

  wgmma takes rows by 64: of other widths, two blocks overlap.
  """
  if head_dim % 64 == 0:
    return ((0, head_dim),)
  return (0, 64), (head_dim - 64, 64)


def tile(value: float, shape: tuple[int, int]):
  """Returns a tile of one value, in the layout of wgmma."""
  return plgpu.layout_cast(
    jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA
  )


def column(value: float, num_queries: int):
  """Returns a value for each query."""
  return plgpu.layout_cast(
    jnp.full((num_queries,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(0)
  )


def across(values, shape: tuple[int, ...]):
  """Returns values of queries, repeated down a tile."""
  return lax.broadcast_in_dim(values, shape, [1])


def down(values, shape: tuple[int, ...]):
  """Returns values of keys, repeated across a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def zero_blocks(head_dim: int, num_queries: int) -> Blocks:
  """Returns acc of no keys."""
  blocks = row_blocks(head_dim)
  return tuple(tile(0.0, (size, num_queries)) for _, size in blocks)


def scale_blocks(acc: Blocks, factors) -> Blocks:
  """Returns acc with a factor for each query."""
  return tuple(rows * across(factors, rows.shape) for rows in acc)


def init(head_dim: int, block_kv: int, num_queries: int) -> State:
  """Returns the softmax over no keys."""
  return State(
    zero_blocks(head_dim, num_queries),
    column(-jnp.inf, num_queries),
    tile(0.0, (block_kv, num_queries)),
  )


def to_base_2(qk, scale: float, logits_soft_cap: float | None):
  """Returns the scores of products q k: scaled, capped, in base 2."""
  if logits_soft_cap is None:
    return qk * (scale * LOG2_E)
  # tanh x = 1 - 2 / (1 + e^2x). The hardware's tanh errs by 5e-4, which a cap
  # of 50 makes 0.025.
  e = jnp.exp2(qk * (2 * LOG2_E * scale / logits_soft_cap))
  return (1 - 2 / (1 + e)) * (logits_soft_cap * LOG2_E)


def fold(state: State, s, weighted=None):
  """Returns the state but for the product V^T P, and P, of scores s.

  Args:
    state: the softmax over the keys before.
    s: scores in base 2, -inf where they do not count.
    weighted: the same, plus log2 of what multiplies the values of the keys; P
      is 2^(weighted - m) then, and m its greatest: P is at most 1.
  """
  if weighted is None:
    weighted = s
  m = jnp.maximum(state.m, weighted.max(axis=0))
  shift = across(or_zero(m), s.shape)
  counted = jnp.exp2(s - shift)
  p = counted if weighted is s else jnp.exp2(weighted - shift)
  alpha = jnp.exp2(state.m - or_zero(m))
  acc, l = scale_blocks(state.acc, alpha), state.l
  if weighted is s:
    return State(acc, m, l * across(alpha, l.shape) + counted), p
  root = across(half_factor(state.m - or_zero(m)), l.shape)
  return State(acc, m, l * root * root + counted), p


def half_factor(difference):
  """Returns the square root of 2^difference.

  What m ends and l begins with weights of values may be 2^100 apart: l times
  2^difference is a number, though 2^difference alone comes to 0.
  """
  return jnp.exp2(difference * 0.5)


def or_zero(m):
  """Returns greatest scores, 0 where nothing was seen."""
  return jnp.where(m == -jnp.inf, 0.0, m)


def sum_rows(state: State) -> Summed:
  """Returns the state with the sums over all keys."""
  return Summed(state.acc, state.m, state.l.sum(axis=0))


def finish(state: Summed, sinks):
  """Returns the normalised output and the natural log-sum-exp.

  Args:
    state: the softmax over all keys.
    sinks: f32[num_queries], a logit in base 2 that only the denominator
      counts, or None. What has seen no key stays empty.
  """
  acc, m, l = state
  sees = l != 0  # NaN is no emptiness
  if sinks is not None:
    top = or_zero(jnp.maximum(m, sinks))
    alpha = jnp.exp2(m - top)
    acc = scale_blocks(acc, alpha)
    l = jnp.where(sees, l * alpha + jnp.exp2(sinks - top), 0.0)
    m = top
  inverse = jnp.where(sees, 1 / l, 0.0)
  out = scale_blocks(acc, inverse)
  return out, jnp.where(sees, (m + jnp.log2(l)) * (1 / LOG2_E), -jnp.inf)


def matmul(a, b):
  """Returns a @ b by wgmma, in f32; operands are in shared memory."""

  def issue(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = a.shape[0], b.shape[1]
  return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))


def matmul_meanwhile(
  shape: tuple[int, int],
  operands: Iterable[Callable[[], Any]],
  do: Callable[[], Any],
  *,
  interpreted: bool,
):
  """Returns the sum of a @ b by wgmma, in f32, and what `do` returns meanwhile.

  Args:
    shape: of the result.
    operands: functions that return a, the left operand, in registers, and b,
      the right one, in shared memory; each is called while wgmma is at the
      product before.
    do: what to do while wgmma is at the last.
    interpreted: whether an interpreter runs it, which has no such wgmma.
  """
  if interpreted:
    products = [_product(*make()) for make in operands]
    return functools.reduce(jnp.add, products), do()

  def issue(acc):
    for make in operands:
      plgpu.wgmma(acc, *make())
    result = do()
    return acc[...], result

  return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))


def _product(a, b):
  """Returns a @ b without wgmma."""
  return a[...].astype(jnp.float32) @ b[...].astype(jnp.float32)


def accumulate(acc, a, b, *, interpreted: bool):
  """Returns acc + a @ b by wgmma, without a second accumulator.

  Args:
    acc: in f32.
    a: the left operand, in shared memory or in registers.
    b: the right operand, in shared memory.
    interpreted: whether an interpreter runs it, which cannot start from a
      given accumulator, nor multiply registers.
  """
  if interpreted:
    in_registers = isinstance(a, jax.Array)
    return acc + (_product(a, b) if in_registers else matmul(a, b))
  return cast(
    Array,
    pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc)),
  )
