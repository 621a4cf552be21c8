"""Decode: folds a tile of K and V into the softmax.

  S = K Q^T, scaled, biased, masked     P = 2^(S - m)     O += V^T P

Tiles of 8-bit numbers become operands in registers (`fragments`). Scales of
keys multiply their scores. Of the scales of values, the logarithms are added to
the exponents (`softmax.fold`).
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

# Columns of K that are widened while wgmma multiplies those before, and of V
# that are rewritten at once, to spare registers.
_COLUMNS = 64
# Smaller scales of values, as those of zeros, count as this: 2^100 times the
# greatest weight of a key is still a number.
_TINY = 2.0**-100


@dataclasses.dataclass(frozen=True)
class KVTile:
  """A tile of the program, and which of its elements count."""

  problem: DecodeProblem
  smem: Scratch
  tiles: VisitedTiles  # of the sequence
  slopes: jax.Array | None  # of ALiBi, for each query
  tree: tree_bits.Few | None  # of the sequence, and of the columns
  nth: jax.Array  # number of the tile in the program
  base: jax.Array  # first position
  mapped: jax.Array  # a bit per chunk

  def mask(self, shape, sees):
    """Returns a mask of the visible elements; row i is position base + i."""
    return self.row_mask(_iota(shape, 0), sees)

  def row_mask(self, rows, sees):
    """Returns which rows of the tile are visible, in mapped pages."""
    chunks = rows >> int(math.log2(self.problem.chunk))  # a power of two
    mapped = lax.broadcast_in_dim(self.mapped, rows.shape, [])
    return sees(self.base + rows) & ((mapped >> chunks) & 1 != 0)

  @property
  def is_full(self):
    """Whether every query sees every key."""
    all_mapped = self.mapped == (1 << self.problem.num_chunks) - 1
    return self.tiles.sees_all(self.base) & all_mapped

  def wait(self, which: Ring) -> None:
    """Waits for K or V."""
    ring.wait(self.problem, which, self.nth)

  def get(self, which: Ring):
    """Returns K or V in the ring."""
    return ring.tile(self.problem, which, self.nth)

  def scales(self, which: Ring):
    """Returns the scales of the rows."""
    return ring.scales(self.problem, which, self.nth)

  def give_back(self, which: Ring) -> None:
    """Lets the ring take the next tile."""
    ring.give_back(self.problem, which, self.nth)


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
    problem: The static facts.
    smem: Shared memory and barriers.
    tiles: Of the sequence.
    slopes: Of ALiBi, in base 2, for each query, or None.
    tree: Words of the columns and of the sequence, or None.
    nth: Number of the tile in the program.
    base: Its first position.
    ids: The page of each chunk.
    state: The softmax over the keys before.
  """
  mapped = mapped_bits(ids, problem.num_pages)
  tile = KVTile(problem, smem, tiles, slopes, tree, nth, base, mapped)
  # 1. Scores, their mask, and P.
  if problem.is_quantised:
    (acc, m, l), p, v = _fold_narrow_scores(tile, state)
    _store_p(problem, smem.p, p)
  else:
    (acc, m, l), p = softmax.fold(state, _scores(tile))
    _store_p(problem, smem.p, p)
    v = _wait_for_v(tile)
  plgpu.commit_smem()
  # 2. O += V^T P.
  acc = tuple(
    wgmma.accumulate(
      rows,
      v_rows,
      smem.p.T,
      interpreted=problem.interpret is not None,
    )
    for rows, v_rows in zip(acc, v, strict=True)
  )
  # 3. V goes back to the producer. (8-bit V went when it was in registers.)
  if not problem.is_quantised:
    tile.give_back(smem.v)
  return RunningSoftmax(acc, m, l)


def _store_p(problem, p_smem, p):
  """Stores P; `commit_smem` has to follow, for others to see it.

  The warps have met since the last product, to find the greatest score, so none
  still reads what is stored over. A plain store would have them meet before and
  after.
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
  """Returns the scores in base 2, -inf where they do not count."""
  smem = tile.smem
  tile.wait(smem.k)
  s = wgmma.matmul([(tile.get(smem.k), smem.q.T)])
  tile.give_back(smem.k)
  return _masked(tile, s)[0]


def _masked(tile, s):
  """Returns products q k as scores in base 2, and which count."""
  spec = tile.problem.spec
  is_seen = tile.mask(s.shape, functools.partial(_sees, tile))
  s = base2.to_base_2(s, spec.scale, spec.logits_soft_cap)
  if tile.slopes is not None:
    s += _distances(tile, s.shape) * softmax.across(tile.slopes, s.shape)
  return jnp.where(is_seen, s, -jnp.inf), is_seen


def _fold_narrow_scores(tile, state):
  """Returns the state but for V^T P, P, and the rows of V^T in registers."""
  problem, smem = tile.problem, tile.smem
  tile.wait(smem.k)
  scales = tile.scales(smem.k)

  def meanwhile():
    tile.give_back(smem.k)
    return _load_v(tile)

  s, (v, v_scales) = softmax.matmul_meanwhile(
    (problem.config.block_kv, problem.num_queries),
    _parts_of_k(tile),
    meanwhile,
    interpreted=problem.interpret is not None,
  )
  s, is_seen = _masked(tile, s * softmax.down(scales, s.shape))
  weighted, taint = _weighted(v_scales, s, is_seen)
  state, p = softmax.fold(state, s, weighted)
  return state, p + taint, v


def _parts_of_k(tile):
  """Returns functions that return some columns of K, and those of Q."""
  k_smem, q_smem = tile.get(tile.smem.k), tile.smem.q
  is_interpreted = tile.problem.interpret is not None
  width = tile.problem.head_dim

  def part(start):
    size = min(_COLUMNS, width - start)
    k = fragments.load_k(k_smem, start, size, interpreted=is_interpreted)
    return k, q_smem.at[:, pl.ds(start, size)].T

  return [functools.partial(part, x) for x in range(0, width, _COLUMNS)]


def _load_v(tile):
  """Returns the rows of V^T by blocks, in registers, and the scales of V."""
  problem, ring_of_v = tile.problem, tile.smem.v
  v_smem = tile.get(ring_of_v)
  is_interpreted = problem.interpret is not None
  tile.wait(ring_of_v)
  if problem.kv_dtype != jnp.int8:  # 0 times any of its numbers is 0

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
  tile.give_back(ring_of_v)
  return v, scales


def _weighted(scales, s, is_seen):
  """Returns the exponents of P, and what makes it NaN where scales are."""
  taint = scales * 0
  # The log-sum-exp does not depend on values, whatever they are.
  weights = jnp.where(taint == 0, jnp.log2(jnp.maximum(scales, _TINY)), 0.0)
  weighted = s + softmax.down(weights, s.shape)
  taint = softmax.down(taint, s.shape)
  return (
    jnp.where(is_seen, weighted, -jnp.inf),
    jnp.where(is_seen, taint, 0.0),
  )


def _wait_for_v(tile):
  """Returns the rows of V^T by blocks, in shared memory.

  Zeroes rows of V that no query sees, if there are any.
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
  """Returns positions of keys, down the rows, minus those of the queries."""
  distances = _iota(shape, 0) + (tile.base - (tile.tiles.kv_len - 1))
  if tile.problem.max_q_len > 1:
    distances += _tokens_from_last(tile.problem, tile.tiles, shape)
  return distances.astype(jnp.float32)


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _sees(tile, positions):
  """Returns which of the positions, down the rows, each query sees."""
  problem, tiles, shape = tile.problem, tile.tiles, positions.shape
  if not problem.has_q_lens:
    return tiles.sees(positions)
  # The columns past the sequence's query tokens see nothing.
  if tile.tree is not None:
    words = softmax.across(tile.tree.of_queries, shape)
    sees_new = tree_bits.has(words, tiles.nth_new(positions))
    sees = tiles.sees(positions, tree_bits.unseen(words), sees_new)
    return sees & (_token(problem, shape) < tiles.num_new)
  from_last = _tokens_from_last(problem, tiles, shape)
  sees = tiles.sees(positions, from_last if problem.spec.causal else 0)
  return sees & (from_last >= 0)


def _tokens_from_last(problem, tiles, shape):
  """Returns how far each query is from the last; negative for no query."""
  return tiles.num_earlier - _token(problem, shape)


def _token(problem, shape):
  """Returns which query token of its sequence each column belongs to."""
  return lax.div(_iota(shape, 1), jnp.int32(problem.group))


def _are_seen(tile, positions):
  """Returns which of the positions, down the rows, some query sees."""
  if tile.tree is None:
    return tile.tiles.are_seen(positions)
  word = lax.broadcast_in_dim(tile.tree.of_seqs, positions.shape, [])
  sees_new = tree_bits.has(word, tile.tiles.nth_new(positions))
  return tile.tiles.are_seen(positions, sees_new)
