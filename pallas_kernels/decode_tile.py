"""What the decode kernel does with a tile of K and V: folds it into a softmax.

  S = K Q^T, scaled, biased, masked     P = 2^(S - m)     O += V^T P

Tiles of 8-bit numbers become operands while wgmma is at the product before: V
during K Q^T, the next K during V^T P. Scales of keys multiply their scores. Of
the scales of values, the logarithms join the exponents (`online_softmax.fold`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import kv_ring, online_softmax, tree_bits
from pallas_kernels.decode_problem import Problem
from pallas_kernels.kv_tiles import Tiles

_COLUMNS = 64  # of V that are rewritten at once, to spare registers
# Smaller scales of values, as those of zeros, count as this: 2^100 times the
# greatest weight of a key is still a number.
_TINY = 2.0**-100


@dataclasses.dataclass(frozen=True)
class Tile:
  """A tile of the program, and what of it counts."""

  problem: Problem
  smem: Any  # what `scratch` asks for
  tiles: Tiles  # of the sequence
  slopes: Any  # of ALiBi, of the queries, or None
  tree: tree_bits.Few | None  # of the sequence, and of the columns
  nth: Any  # of the program
  base: Any  # first position
  mapped: Any  # a bit per chunk

  def seen(self, shape, sees):
    """Tells which elements count: seen, of mapped pages; rows are positions."""
    rows = _iota(shape, 0)
    chunks = rows >> int(math.log2(self.problem.chunk))  # a power of two
    is_mapped = (lax.broadcast_in_dim(self.mapped, shape, []) >> chunks) & 1
    return sees(self.base + rows) & (is_mapped != 0)

  def wait(self, which, ahead=0):
    """Waits for this tile of K or V, or for one ahead; see `kv_ring.wait`."""
    kv_ring.wait(self.problem, self.smem, which, self.nth + ahead)

  def operand(self, which):
    """Returns the operand of K or V."""
    return kv_ring.operand(self.problem, self.smem, which, self.nth)

  def scales(self, which):
    """Returns the scales of the rows."""
    return kv_ring.scales(self.problem, self.smem, which, self.nth)

  def give_back(self, which):
    """Lets the ring take the next tile."""
    kv_ring.give_back(self.problem, self.smem, which, self.nth)


def fold(
  problem: Problem,
  smem,
  tiles: Tiles,
  slopes,
  tree: tree_bits.Few | None,
  nth,
  base,
  ids,
  is_last,
  state,
):
  """Folds the program's nth tile into the softmax.

  Args:
    problem: what is static.
    smem: what `scratch` asks for.
    tiles: of the sequence.
    slopes: of ALiBi, in base 2, for each query, or None.
    tree: words of the columns and of the sequence, or None.
    nth: number of the tile, of the program's.
    base: its first position.
    ids: the page of each chunk.
    is_last: whether it is the last of the piece.
    state: the softmax over the keys before.
  """
  mapped = kv_ring.mapped_chunks(problem, ids)
  tile = Tile(problem, smem, tiles, slopes, tree, nth, base, mapped)
  s, is_seen = _scores(tile)
  weighted = taint = None
  if problem.is_quantised:
    weighted, taint = _weighted(tile, s, is_seen)
  (acc, m, l), p = online_softmax.fold(state, s, weighted)
  if taint is not None:
    p += taint
  smem.p_smem.T[...] = p.astype(problem.operand_dtype)
  if not problem.is_quantised:
    tile.wait(kv_ring.V)
  _zero_unseen_rows(tile)
  plgpu.commit_smem()

  def wait_for_next_k():
    @pl.when(jnp.logical_not(is_last))
    def _():
      tile.wait(kv_ring.K, 1)

  v_smem = tile.operand(kv_ring.V)
  columns = online_softmax.row_blocks(problem.head_dim)
  acc = tuple(
    online_softmax.accumulate(
      rows,
      v_smem.at[:, pl.ds(start, size)].T,
      smem.p_smem.T,
      wait_for_next_k if problem.is_quantised and start == 0 else None,
      interpreted=problem.interpret is not None,
    )
    for rows, (start, size) in zip(acc, columns, strict=True)
  )
  if not problem.is_quantised:
    tile.give_back(kv_ring.V)
  return online_softmax.State(acc, m, l)


def _scores(tile):
  """Returns the scores in base 2, -inf where they do not count, and where."""
  problem = tile.problem
  meanwhile = None
  if problem.is_quantised:
    plgpu.commit_smem()
    meanwhile = functools.partial(tile.wait, kv_ring.V)
  else:
    tile.wait(kv_ring.K)
  k_smem, q_smem = tile.operand(kv_ring.K), tile.smem.q_smem
  s = online_softmax.matmul(k_smem, q_smem.T, meanwhile)
  is_seen = tile.seen(s.shape, functools.partial(_sees, tile))
  if problem.is_quantised:
    s *= online_softmax.down(tile.scales(kv_ring.K), s.shape)
  tile.give_back(kv_ring.K)
  s = online_softmax.to_base_2(s, problem.scale, problem.logits_soft_cap)
  if problem.has_alibi:
    s += _distances(tile, s.shape) * online_softmax.across(tile.slopes, s.shape)
  return jnp.where(is_seen, s, -jnp.inf), is_seen


def _weighted(tile, s, is_seen):
  """Returns the exponents of P, and what makes it NaN where scales are."""
  scales = tile.scales(kv_ring.V)
  tile.give_back(kv_ring.V)
  taint = scales * 0
  # The log-sum-exp does not depend on values, whatever they are.
  weights = jnp.where(taint == 0, jnp.log2(jnp.maximum(scales, _TINY)), 0.0)
  weighted = s + online_softmax.down(weights, s.shape)
  taint = online_softmax.down(taint, s.shape)
  return (
    jnp.where(is_seen, weighted, -jnp.inf),
    jnp.where(is_seen, taint, 0.0),
  )


def _zero_unseen_rows(tile):
  """Zeroes rows of V that no query sees, if there are any.

  All warps are past `to_float16`: they met when P was stored.
  """
  problem, v_smem = tile.problem, tile.operand(kv_ring.V)
  all_mapped = tile.mapped == (1 << problem.num_chunks) - 1

  @pl.when(jnp.logical_not(tile.tiles.sees_all(tile.base) & all_mapped))
  def _():
    for start, size in online_softmax.row_blocks(problem.head_dim):
      for column in range(start, start + size, _COLUMNS):
        v = v_smem.at[:, pl.ds(column, _COLUMNS)]
        keep = tile.seen(v.shape, functools.partial(_are_seen, tile))
        v[...] = jnp.where(keep, v[...], 0.0)


def _distances(tile, shape):
  """Returns positions of keys, down the rows, minus those of the queries."""
  distances = _iota(shape, 0) + (tile.base - (tile.tiles.kv_len - 1))
  if tile.problem.max_q_len > 1:
    distances += _before(tile.problem, tile.tiles, shape)
  return distances.astype(jnp.float32)


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _sees(tile, positions):
  """Tells which of the positions, down the rows, each query sees."""
  problem, tiles, shape = tile.problem, tile.tiles, positions.shape
  if not problem.has_q_lens:
    return tiles.sees(positions)
  # The columns past the sequence's query tokens see nothing.
  if tile.tree is not None:
    words = online_softmax.across(tile.tree.of_queries, shape)
    sees_new = tree_bits.has(words, tiles.nth_new(positions))
    sees = tiles.sees(positions, tree_bits.before(words), sees_new)
    return sees & (_token(problem, shape) < tiles.num_new)
  before = _before(problem, tiles, shape)
  sees = tiles.sees(positions, before if problem.causal else 0)
  return sees & (before >= 0)


def _before(problem, tiles, shape):
  """Returns how many tokens before the last each query is, below 0 for none."""
  return tiles.num_earlier - _token(problem, shape)


def _token(problem, shape):
  """Returns which query token of its sequence each column belongs to."""
  return lax.div(_iota(shape, 1), jnp.int32(problem.group))


def _are_seen(tile, positions):
  """Tells which of the positions, down the rows, some query sees."""
  if tile.tree is None:
    return tile.tiles.are_seen(positions)
  word = lax.broadcast_in_dim(tile.tree.of_seqs, positions.shape, [])
  sees_new = tree_bits.has(word, tile.tiles.nth_new(positions))
  return tile.tiles.are_seen(positions, sees_new)
