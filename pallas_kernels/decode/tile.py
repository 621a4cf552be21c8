"""Decode: folds one KV tile into the softmax.

  S = K Q^T, scaled, biased, masked     P = 2^(S - m)     O += V^T P

8-bit tiles are converted to wgmma operands in registers (`fragments`). Scores
are multiplied by the scales of their keys. The log2 of the value scales is
added to the exponents of P (`softmax.fold`).
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.common import base2, tree_bits, wgmma
from pallas_kernels.common.kv_tiles import VisitedTiles, mapped_bits
from pallas_kernels.decode import fragments, ring, softmax
from pallas_kernels.decode.problem import DecodeProblem, Ring, Scratch
from pallas_kernels.decode.softmax import RunningSoftmax

# Columns per step, to save registers: of 8-bit K, which are converted while
# wgmma multiplies the previous ones, and of V, whose rows are zeroed.
_COLUMNS = 64
# Value scales are clamped to at least this (a page of zeros may have scale 0).
# 2^100 times the maximum weight of a key is still finite.
_MIN_SCALE = 2.0**-100


@dataclasses.dataclass(frozen=True)
class KVTile:
  """A KV tile of a split, and its masks."""

  problem: DecodeProblem
  smem: Scratch
  tiles: VisitedTiles  # of the sequence
  slopes: jax.Array | None  # ALiBi slopes in base 2, one per query
  tree: tree_bits.Few | None  # words of the columns, and of the sequence
  nth: jax.Array  # index of the tile in the program
  base: jax.Array  # first position
  mapped: jax.Array  # bit j: whether the page of the j-th chunk is mapped

  def mask(self, shape, sees):
    """Returns a mask of the visible elements; row i is position base + i.

    Args:
      shape: Shape of the mask, [block_kv, columns].
      sees: Returns a mask of visible positions, from positions.
    """
    return self.row_mask(_iota(shape, 0), sees)

  def row_mask(self, rows, sees):
    """Returns a mask of the rows that are visible and in mapped pages.

    Args:
      rows: i32, row numbers in the tile.
      sees: See `mask`.
    """
    chunks = rows >> int(math.log2(self.problem.chunk))  # a power of two
    mapped = lax.broadcast_in_dim(self.mapped, rows.shape, [])
    return sees(self.base + rows) & ((mapped >> chunks) & 1 != 0)

  @property
  def is_full(self):
    """Whether every query sees every key of the tile."""
    all_mapped = self.mapped == (1 << self.problem.num_chunks) - 1
    return self.tiles.sees_all(self.base) & all_mapped

  def wait(self, which: Ring) -> None:
    """Waits until K or V of the tile is loaded."""
    ring.wait(self.problem, which, self.nth)

  def get(self, which: Ring):
    """Returns a reference to K or V in its ring."""
    return ring.tile(self.problem, which, self.nth)

  def scales(self, which: Ring):
    """Returns the scales of the rows of K or V."""
    return ring.scales(self.problem, which, self.nth)

  def release(self, which: Ring) -> None:
    """Releases the stage of K or V to the producer."""
    ring.release(self.problem, which, self.nth)


def fold(
  problem: DecodeProblem,
  smem: Scratch,
  tiles: VisitedTiles,
  slopes: jax.Array | None,
  tree: tree_bits.Few | None,
  nth,
  base,
  ids,
  state: RunningSoftmax,
) -> RunningSoftmax:
  """Folds the program's nth tile into the softmax.

  Args:
    problem: The static sizes.
    smem: Shared memory and barriers.
    tiles: The visited tiles of the sequence.
    slopes: f32[num_queries], ALiBi slopes in base 2, or None.
    tree: Words of the columns and of the sequence, or None.
    nth: Index of the tile in the program.
    base: First position of the tile.
    ids: Page id of each chunk.
    state: The softmax state over the previous keys.

  Returns:
    The softmax state over the previous keys and those of the tile.
  """
  mapped = mapped_bits(ids, problem.num_pages)
  tile = KVTile(problem, smem, tiles, slopes, tree, nth, base, mapped)
  # 1. S, its mask, and P, which goes to shared memory as an operand of wgmma.
  # 16-bit V is awaited only after that: its copy overlaps with the softmax.
  if problem.is_quantised:
    (acc, m, l), p, v = _fold_quantised_scores(tile, state)
    _store_p(problem, smem.p, p)
  else:
    (acc, m, l), p = softmax.fold(state, _scores(tile))
    _store_p(problem, smem.p, p)
    v = _wait_for_v(tile)
  plgpu.commit_smem()
  # 2. O += V^T P, block by block of the rows of V^T.
  acc = tuple(
    wgmma.accumulate(
      rows,
      v_rows,
      smem.p.T,
      interpreted=problem.interpret is not None,
    )
    for rows, v_rows in zip(acc, v, strict=True)
  )
  # 3. Release V. (8-bit V was released as soon as it was in registers.)
  if not problem.is_quantised:
    tile.release(smem.v)
  return RunningSoftmax(acc, m, l)


def _store_p(problem, p_smem, p):
  """Stores P in shared memory; the caller must call `commit_smem` afterwards.

  The reduction of the maximum has synchronised the warps since the previous
  product, so none still reads the old P. A plain store would synchronise them
  twice more, before and after.
  """
  p = p.astype(problem.operand_dtype)
  if problem.interpret is not None:
    p_smem.T[...] = p
    return
  transforms = problem.operand_transforms

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.Layout.WGMMA))
  def store(_, tiles, p):
    transposed = utils.memref_transpose(tiles, (1, 0, 3, 2))
    p.store_tiled(transposed, transforms[1].swizzle)

  store(p_smem, p)


def _scores(tile):
  """Returns the scores of a 16-bit tile in base 2, -inf where masked."""
  smem = tile.smem
  tile.wait(smem.k)
  s = wgmma.matmul([(tile.get(smem.k), smem.q.T)])
  tile.release(smem.k)
  return _masked(tile, s)[0]


def _masked(tile, s):
  """Returns scores in base 2 from dot products q k, and the mask."""
  spec = tile.problem.spec
  is_seen = tile.mask(s.shape, functools.partial(_sees, tile))
  s = base2.to_base_2(s, spec.scale, spec.logits_soft_cap)
  if tile.slopes is not None:
    s += _distances(tile, s.shape) * softmax.across(tile.slopes, s.shape)
  return jnp.where(is_seen, s, -jnp.inf), is_seen


def _fold_quantised_scores(tile, state):
  """Folds the scores of an 8-bit tile into the softmax.

  Returns:
    The state without the product V^T P; P; and the blocks of V^T in registers.
  """
  problem, smem = tile.problem, tile.smem
  # 1. S = K Q^T. While wgmma multiplies the last columns of K, the warps
  # release K and convert V.
  tile.wait(smem.k)
  scales = tile.scales(smem.k)

  def overlapped():
    tile.release(smem.k)
    return _load_v(tile)

  s, (v, v_scales) = softmax.matmul_with_overlap(
    (problem.config.block_kv, problem.num_queries),
    _parts_of_k(tile),
    overlapped,
    interpreted=problem.interpret is not None,
  )
  # 2. Apply the scales of K to the scores, and those of V to the exponents.
  s, is_seen = _masked(tile, s * softmax.down(scales, s.shape))
  weighted, nan_or_zero = _weighted(v_scales, s, is_seen)
  state, p = softmax.fold(state, s, weighted)
  return state, p + nan_or_zero, v


def _parts_of_k(tile):
  """Returns functions; each loads some columns of K, and those of Q."""
  k_smem, q_smem = tile.get(tile.smem.k), tile.smem.q
  is_interpreted = tile.problem.interpret is not None
  width = tile.problem.head_dim

  def part(start):
    size = min(_COLUMNS, width - start)
    k = fragments.load_k(k_smem, start, size, interpreted=is_interpreted)
    return k, q_smem.at[:, pl.ds(start, size)].T

  return [functools.partial(part, x) for x in range(0, width, _COLUMNS)]


def _load_v(tile):
  """Returns the blocks of 8-bit V^T in registers, and the scales of V."""
  problem, ring_of_v = tile.problem, tile.smem.v
  v_smem = tile.get(ring_of_v)
  is_interpreted = problem.interpret is not None
  tile.wait(ring_of_v)
  # Unseen rows may hold NaN, but not in int8.
  if problem.kv_dtype != jnp.int8:

    @pl.when(jnp.logical_not(tile.is_full))
    def _():
      rows = plgpu.broadcasted_iota(
        jnp.int32, v_smem.shape[:1], 0, layout=fragments.ROWS
      )
      keep = tile.row_mask(rows, functools.partial(_are_seen, tile))
      fragments.zero_rows(v_smem, keep, interpreted=is_interpreted)
      plgpu.commit_smem()

  v = tuple(
    fragments.load_v(v_smem, start, size, interpreted=is_interpreted)
    for start, size in softmax.row_blocks(problem.head_dim)
  )
  scales = tile.scales(ring_of_v)
  tile.release(ring_of_v)
  return v, scales


def _weighted(scales, s, is_seen):
  """Returns the exponents of P, and a term that makes P NaN like the scales.

  Args:
    scales: f32[block_kv], scales of the rows of V.
    s: Scores in base 2.
    is_seen: The mask of `s`.
  """
  nan_or_zero = scales * 0  # NaN if the scale is NaN or infinite, else 0
  # A weight must not be NaN: the log-sum-exp does not depend on V.
  weights = jnp.where(
    nan_or_zero == 0, jnp.log2(jnp.maximum(scales, _MIN_SCALE)), 0.0
  )
  weighted = s + softmax.down(weights, s.shape)
  nan_or_zero = softmax.down(nan_or_zero, s.shape)
  return (
    jnp.where(is_seen, weighted, -jnp.inf),
    jnp.where(is_seen, nan_or_zero, 0.0),
  )


def _wait_for_v(tile):
  """Waits for V, and returns the blocks of V^T in shared memory.

  If the tile has masked keys, zeroes the rows of V that no query sees.
  """
  tile.wait(tile.smem.v)
  v_smem = tile.get(tile.smem.v)
  blocks = softmax.row_blocks(tile.problem.head_dim)

  @pl.when(jnp.logical_not(tile.is_full))
  def _():
    for start, size in blocks:
      for column in range(start, start + size, _COLUMNS):
        v = v_smem.at[:, pl.ds(column, _COLUMNS)]
        keep = tile.mask(v.shape, functools.partial(_are_seen, tile))
        v[...] = jnp.where(keep, v[...], 0.0)

  return [v_smem.at[:, pl.ds(start, size)].T for start, size in blocks]


def _distances(tile, shape):
  """Returns f32 positions of keys (rows) minus those of queries (columns)."""
  distances = _iota(shape, 0) + (tile.base - (tile.tiles.kv_len - 1))
  if tile.problem.max_q_len > 1:
    distances += _tokens_from_last(tile.problem, tile.tiles, shape)
  return distances.astype(jnp.float32)


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _sees(tile, positions):
  """Returns a mask of the positions (rows) that each query (column) sees."""
  problem, tiles, shape = tile.problem, tile.tiles, positions.shape
  if not problem.has_q_lens:
    return tiles.sees(positions)
  # Columns past the query tokens of the sequence see nothing.
  if tile.tree is not None:
    words = softmax.across(tile.tree.of_queries, shape)
    sees_new = tree_bits.has(words, tiles.nth_new(positions))
    sees = tiles.sees(positions, tree_bits.unseen(words), sees_new)
    return sees & (_token(problem, shape) < tiles.num_new)
  from_last = _tokens_from_last(problem, tiles, shape)
  sees = tiles.sees(positions, from_last if problem.spec.causal else 0)
  return sees & (from_last >= 0)


def _tokens_from_last(problem, tiles, shape):
  """Returns each column's distance from the last query token, in tokens.

  It is negative for columns past the last query token.
  """
  return tiles.num_earlier - _token(problem, shape)


def _token(problem, shape):
  """Returns the index of the query token of each column."""
  return lax.div(_iota(shape, 1), jnp.int32(problem.group))


def _are_seen(tile, positions):
  """Returns a mask of the positions (rows) that at least one query sees."""
  if tile.tree is None:
    return tile.tiles.are_seen(positions)
  word = lax.broadcast_in_dim(tile.tree.of_seqs, positions.shape, [])
  sees_new = tree_bits.has(word, tile.tiles.nth_new(positions))
  return tile.tiles.are_seen(positions, sees_new)
