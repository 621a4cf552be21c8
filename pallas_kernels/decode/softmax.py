"""Decode: the streaming softmax in registers. Keys are rows, queries columns.

Scores of a tile are S = K Q^T: a row for each key, a column for each query.
Decode has few queries, and wgmma wants 64 rows but is content with 8 columns.
The state of each column is that of `base2`; its acc is a column of V^T P. A
tile is folded in by

  m' = max(m, max s)    l' = 2^(m - m') l + sum 2^(s - m')
  acc' = 2^(m - m') acc + V^T 2^(s - m')

Where values have scales, m is the greatest of s + log2 scale, and so are the
exponents of P; l still sums 2^(s - m).

Sums over keys cross the warps, so l is kept apart for each row of the tiles,
and summed once, at the end.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels.common import base2, wgmma
from pallas_kernels.common.base2 import Softmax, or_zero

QUERIES = plgpu.Layout.WGMMA.reduce(0)  # a value for each query

type Blocks = tuple[Float[Array, "rows num_queries"], ...]  # see `row_blocks`


class RunningSoftmax(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Blocks
  m: Float[Array, " num_queries"]
  l: Float[Array, "block_kv num_queries"]


def row_blocks(head_dim: int) -> tuple[tuple[int, int], ...]:
  """Returns the start and size of the blocks of rows of acc.

  wgmma takes rows by 64: of other widths, two blocks overlap.
  """
  if head_dim % 64 == 0:
    return ((0, head_dim),)
  return (0, 64), (head_dim - 64, 64)


def column(value: float, num_queries: int):
  """Returns one value for all queries."""
  return plgpu.layout_cast(
    jnp.full((num_queries,), value, jnp.float32), QUERIES
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
  return tuple(wgmma.full_tile(0.0, (size, num_queries)) for _, size in blocks)


def scale_blocks(acc: Blocks, factors) -> Blocks:
  """Returns acc times a factor for each query."""
  return tuple(rows * across(factors, rows.shape) for rows in acc)


def add_blocks(a: Blocks, b: Blocks) -> Blocks:
  """Returns the sum of two acc."""
  return tuple(x + y for x, y in zip(a, b, strict=True))


def init(head_dim: int, block_kv: int, num_queries: int) -> RunningSoftmax:
  """Returns the softmax over no keys."""
  return RunningSoftmax(
    zero_blocks(head_dim, num_queries),
    column(-jnp.inf, num_queries),
    wgmma.full_tile(0.0, (block_kv, num_queries)),
  )


def empty(head_dim: int, num_queries: int) -> Softmax:
  """Returns the softmax over no keys, summed."""
  return Softmax(
    zero_blocks(head_dim, num_queries),
    column(-jnp.inf, num_queries),
    column(0.0, num_queries),
  )


def fold(
  state: RunningSoftmax, s, weighted=None
) -> tuple[RunningSoftmax, Array]:
  """Returns the state but for the product V^T P, and P, of scores s.

  Args:
    state: The softmax over the keys before.
    s: Scores in base 2, -inf where they do not count.
    weighted: The same, plus log2 of what multiplies the values of the keys; P
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
    return RunningSoftmax(acc, m, l * across(alpha, l.shape) + counted), p
  root = across(base2.half_factor(state.m - or_zero(m)), l.shape)
  return RunningSoftmax(acc, m, l * root * root + counted), p


def sum_rows(state: RunningSoftmax) -> Softmax:
  """Returns the state with the sums over all keys."""
  return Softmax(state.acc, state.m, state.l.sum(axis=0))


def merge(states: list[Softmax]) -> Softmax:
  """Returns the softmax over the keys of all states, folded in order."""
  return base2.merge(states, scale_blocks, add_blocks, far_apart=True)


def finish(state: Softmax, sinks):
  """Returns the output and the log-sum-exp; see `base2.finish`."""
  return base2.finish(state, sinks, scale_blocks)


def matmul_meanwhile[T](
  shape: tuple[int, int],
  operands: Iterable[Callable[[], tuple]],
  do: Callable[[], T],
  *,
  interpreted: bool,
) -> tuple[Array, T]:
  """Returns the sum of a @ b by wgmma, in f32, and what `do` returns meanwhile.

  Args:
    shape: Of the result.
    operands: Functions that return a, the left operand, in registers, and b,
      the right one, in shared memory; each is called while wgmma is at the
      product before.
    do: What to do while wgmma is at the last.
    interpreted: Whether an interpreter runs it, which has no such wgmma.
  """
  if interpreted:
    products = [wgmma.plain_product(*make()) for make in operands]
    return functools.reduce(jnp.add, products), do()

  def issue(acc):
    for make in operands:
      plgpu.wgmma(acc, *make())
    result = do()
    return acc[...], result

  return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))
