"""Decode: the online softmax in registers. Keys are rows, queries are columns.

The scores of a tile are S = K Q^T: one row per key, one column per query.
Decode has few queries, and wgmma needs 64 rows but only 8 columns. The state of
each column is that of `base2`; its acc is a column of V^T P. A tile is folded
in by

  m' = max(m, max s)    l' = 2^(m - m') l + sum 2^(s - m')
  acc' = 2^(m - m') acc + V^T 2^(s - m')

With value scales, m is the maximum of s + log2 scale, and P is
2^(s + log2 scale - m); l still sums 2^(s - m).

A sum over keys crosses the warps. Therefore l has one partial sum per row of
the tile, and the rows are summed once, after the last tile.
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

QUERIES = plgpu.Layout.WGMMA.reduce(0)  # layout of one value per query

type Blocks = tuple[Float[Array, "rows num_queries"], ...]  # see `row_blocks`


class RunningSoftmax(NamedTuple):
  """The softmax state over the keys folded in so far; l is not yet reduced."""

  acc: Blocks
  m: Float[Array, " num_queries"]
  l: Float[Array, "block_kv num_queries"]


def row_blocks(head_dim: int) -> tuple[tuple[int, int], ...]:
  """Returns (start, size) of each block of rows of acc.

  wgmma needs multiples of 64 rows. For other head_dim, two blocks overlap.
  """
  if head_dim % 64 == 0:
    return ((0, head_dim),)
  return (0, 64), (head_dim - 64, 64)


def column(value: float, num_queries: int):
  """Returns f32[num_queries] filled with one value, in layout `QUERIES`."""
  return plgpu.layout_cast(
    jnp.full((num_queries,), value, jnp.float32), QUERIES
  )


def across(values, shape: tuple[int, ...]):
  """Broadcasts one value per query (column) to a tile."""
  return lax.broadcast_in_dim(values, shape, [1])


def down(values, shape: tuple[int, ...]):
  """Broadcasts one value per key (row) to a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def zero_blocks(head_dim: int, num_queries: int) -> Blocks:
  """Returns an acc of zeros."""
  blocks = row_blocks(head_dim)
  return tuple(wgmma.full_tile(0.0, (size, num_queries)) for _, size in blocks)


def scale_blocks(acc: Blocks, factors) -> Blocks:
  """Returns acc times one factor per query."""
  return tuple(rows * across(factors, rows.shape) for rows in acc)


def add_blocks(a: Blocks, b: Blocks) -> Blocks:
  """Returns the sum of two acc."""
  return tuple(x + y for x, y in zip(a, b, strict=True))


def init(head_dim: int, block_kv: int, num_queries: int) -> RunningSoftmax:
  """Returns the running softmax state over no keys."""
  return RunningSoftmax(
    zero_blocks(head_dim, num_queries),
    column(-jnp.inf, num_queries),
    wgmma.full_tile(0.0, (block_kv, num_queries)),
  )


def empty(head_dim: int, num_queries: int) -> Softmax:
  """Returns the reduced softmax state over no keys."""
  return Softmax(
    zero_blocks(head_dim, num_queries),
    column(-jnp.inf, num_queries),
    column(0.0, num_queries),
  )


def fold(
  state: RunningSoftmax, s, weighted=None
) -> tuple[RunningSoftmax, Array]:
  """Folds scores into the state; the caller adds the product V^T P to acc.

  Args:
    state: The softmax state over the previous keys.
    s: Scores in base 2, -inf where masked.
    weighted: `s` plus log2 of the value scales, -inf where masked; None without
      scales. P is 2^(weighted - m), and m is the maximum of `weighted`, so that
      P is at most 1.

  Returns:
    The state with acc rescaled, and P.
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
  """Returns the state with l summed over the rows."""
  return Softmax(state.acc, state.m, state.l.sum(axis=0))


def merge(states: list[Softmax]) -> Softmax:
  """Returns the state over the keys of all states; see `base2.merge`."""
  return base2.merge(states, scale_blocks, add_blocks, far_apart=True)


def finish(state: Softmax, sinks):
  """Returns the output and the log-sum-exp; see `base2.finish`."""
  return base2.finish(state, sinks, scale_blocks)


def matmul_with_overlap[T](
  shape: tuple[int, int],
  operands: Iterable[Callable[[], tuple]],
  overlapped: Callable[[], T],
  *,
  interpreted: bool,
) -> tuple[Array, T]:
  """Returns the sum of products a @ b in f32, and the result of `overlapped`.

  wgmma is asynchronous: each function below runs while wgmma computes the
  previous product.

  Args:
    shape: Shape of the sum.
    operands: Functions that return a, the left operand, in registers, and b,
      the right operand, in shared memory.
    overlapped: Function that runs during the last product.
    interpreted: Whether the interpreter runs the kernel; it has no such wgmma.
  """
  if interpreted:
    products = [wgmma.plain_product(*make()) for make in operands]
    return functools.reduce(jnp.add, products), overlapped()

  def issue(acc):
    for make in operands:
      plgpu.wgmma(acc, *make())
    result = overlapped()
    return acc[...], result

  return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))
