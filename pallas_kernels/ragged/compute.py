"""Ragged: the consumer warpgroups, which attend 64 query rows each.

A warpgroup starts Q K^T of a KV tile and P V of the previous tile together. It
computes the softmax of the tile as soon as the scores are ready, while P V and
the products of other warpgroups run. A warpgroup without queries in an item
only waits for the tiles and releases them.
"""

import functools
import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import tree_bits, wgmma
from pallas_kernels.common.base2 import Softmax
from pallas_kernels.common.kv_tiles import mapped_bits
from pallas_kernels.ragged import output, softmax
from pallas_kernels.ragged.config import ROWS
from pallas_kernels.ragged.load import ForEachItem, page_ids
from pallas_kernels.ragged.softmax import RunningSoftmax

_COLUMNS = 64  # columns of V that are zeroed per step, to save registers


def run(for_each_item: ForEachItem) -> None:
  """Runs a consumer warpgroup: attends its rows of all items.

  Args:
    for_each_item: Calls a function with each `Work`.
  """
  for_each_item(_attend_item)
  # Shared memory must outlive the copies of the last output.
  plgpu.wait_smem_to_gmem(0)


def _attend_item(work):
  """Attends the KV tiles of an item, and writes its output or its partial."""
  problem, tile = work.problem, work.item.tile
  empty = softmax.init(ROWS, problem.head_dim)
  first_row = lax.axis_index("warpgroup") * ROWS
  has_queries = first_row >> _log2(problem.group) < tile.num_tokens

  def skip():
    _skip_tiles(work)
    return empty

  state = lax.cond(
    has_queries & (work.item.num_tiles > 0),
    lambda: _attend_tiles(work, empty),
    skip,
  )
  output.write(work, state)


def _skip_tiles(work):
  """Releases Q and all KV tiles of an item, if it has any, unused.

  The barriers count arrivals of all consumers, so each wait and arrival here
  matches one of `_attend_tiles`.
  """
  smem, num_tiles = work.smem, work.item.num_tiles

  @pl.when(num_tiles > 0)
  def _():
    plgpu.barrier_wait(smem.q_loaded.at[work.q_stage])
    plgpu.barrier_arrive(smem.q_consumed.at[work.q_stage])

  @pl.loop(0, num_tiles)
  def _(i):
    stage = work.stage(i)
    plgpu.barrier_wait(smem.k.loaded.at[stage])
    plgpu.barrier_arrive(smem.k.consumed.at[stage])
    _wait_for_v(work, i)
    plgpu.barrier_arrive(smem.v.consumed.at[stage])


def _attend_tiles(work, state):
  """Folds the KV tiles of an item, at least one, into the softmax."""
  problem, smem, last = work.problem, work.smem, work.item.num_tiles - 1
  wg, q_stage = lax.axis_index("warpgroup"), work.q_stage
  by_token, by_row = (x.at[q_stage, wg] for x in smem.q)

  def release_k(i):
    plgpu.barrier_arrive(smem.k.consumed.at[work.stage(i)])
    consumed = smem.q_consumed.at[q_stage]
    pl.when(i == last)(lambda: plgpu.barrier_arrive(consumed))

  slopes = None
  if work.inputs.alibi_slopes is not None:
    slopes = output.load_rows(work.inputs.alibi_slopes, work.item.head)
  fold_scores = functools.partial(_fold_scores, work, slopes)

  # 1. Q K^T of the first tile, and its softmax. K is released right after the
  # product, Q after the product of the last tile.
  plgpu.barrier_wait(smem.q_loaded.at[q_stage])
  problem.reinterpret(by_token, by_row)
  plgpu.barrier_wait(smem.k.loaded.at[work.stage(0)])
  qk = wgmma.matmul(_operands(work, by_row, 0))
  release_k(jnp.int32(0))
  l = wgmma.full_tile(0.0, (ROWS, 8))
  m, l, _, p = fold_scores(0, state.m, l, qk)
  p = p.astype(problem.dtype)

  # 2. P V of each tile but the last, during Q K^T and softmax of the next tile.
  def fold(i, carry):
    state, p = carry
    # a. V of this tile and K of the next are the operands of the two products.
    _wait_for_v(work, i)
    plgpu.barrier_wait(smem.k.loaded.at[work.stage(i + 1)])

    def fold_next(qk):
      release_k(i + 1)
      return fold_scores(i + 1, state.m, state.l, qk)

    # b. Both products, and the softmax of the next tile while P V runs.
    acc, (m, l, alpha, next_p) = softmax.matmul_and_accumulate(
      _operands(work, by_row, i + 1),
      state.acc,
      _left_operand(work, p),
      smem.v.tiles.at[work.stage(i)],
      fold_next,
      interpreted=problem.interpret is not None,
    )
    plgpu.barrier_arrive(smem.v.consumed.at[work.stage(i)])
    # c. Only now is acc complete: rescale it to the maximum of the next tile.
    acc, p = lax.optimization_barrier((acc, next_p))
    acc = softmax.rescale(acc, alpha, interpreted=problem.interpret is not None)
    return RunningSoftmax(acc, m, l), p.astype(problem.dtype)

  first = RunningSoftmax(state.acc, m, l)
  state, p = lax.fori_loop(0, last, fold, (first, p))

  # 3. P V of the last tile.
  _wait_for_v(work, last)
  acc = wgmma.accumulate(
    state.acc,
    _left_operand(work, p),
    smem.v.tiles.at[work.stage(last)],
    interpreted=problem.interpret is not None,
  )
  plgpu.barrier_arrive(smem.v.consumed.at[work.stage(last)])
  return Softmax(acc, state.m, state.l.sum(axis=1))


def _operands(work, q_smem, i):
  """Returns the operands of Q K^T of the i-th tile, by columns of tiles."""
  k_smem, width = work.smem.k.tiles.at[work.stage(i)], work.problem.columns
  return [
    (q_smem.at[j], k_smem.at[:, pl.ds(j * width, width)].T)
    for j in range(q_smem.shape[0])
  ]


def _fold_scores(work, slopes, i, m, l, qk):
  """Folds the scores of the i-th tile into m and l.

  Args:
    work: The item.
    slopes: ALiBi slopes of the rows, or None.
    i: Index of the tile in the item.
    m: See `softmax.fold_scores`.
    l: See `softmax.fold_scores`.
    qk: f32, products Q K^T.

  Returns:
    m, l, the factor to rescale acc, and P.
  """
  problem, base = work.problem, work.base(i)
  has_alibi = slopes is not None
  s = problem.scores(qk, has_alibi)
  if slopes is not None:
    s = _add_distances(work, slopes, base, s)
  sees_all = work.tiles.sees_all(base) & (work.item.tile.has_holes == 0)
  s = lax.cond(
    sees_all,
    lambda s: s,
    lambda s: _mask_scores(work, base, s),
    s,
  )
  # The barrier keeps the whole softmax before the wait for P V.
  factor = problem.factor(has_alibi)
  return lax.optimization_barrier(softmax.fold_scores(m, l, s, factor))


def _left_operand(work, p):
  """Returns P as a wgmma operand, in registers or in shared memory."""
  if not work.problem.p_in_smem:
    return p
  p_smem = work.smem.p.at[lax.axis_index("warpgroup")]
  p_smem[...] = p
  plgpu.commit_smem()
  return p_smem


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _mask_scores(work, base, s):
  """Returns the scores, with -inf where the query does not see the key."""
  column = _iota(s.shape, 1)
  from_last, sees_new = 0, None
  if work.inputs.tree is not None:
    from_last, sees_new = _tree_of_rows(work, base, column)
  elif work.problem.spec.causal:
    from_last = _tokens_from_last(work, _iota(s.shape, 0))
  sees = work.tiles.sees(base + column, from_last, sees_new)
  sees &= _are_mapped(work, base, column)
  return jnp.where(sees, s, -jnp.inf)


def _tokens_from_last(work, rows):
  """Returns the distance of each row from the item's last token, in tokens."""
  first_row = lax.axis_index("warpgroup") * ROWS
  token = (rows + first_row) >> _log2(work.problem.group)
  return work.item.tile.num_earlier - token


def _add_distances(work, slopes, base, s):
  """Adds the ALiBi bias: slopes times (key position - query position)."""
  rows = plgpu.broadcasted_iota(
    jnp.int32, s.shape[:1], 0, layout=softmax.QUERIES
  )
  first = _tokens_from_last(work, rows) + (base - (work.item.tile.kv_len - 1))
  # Registers would spill if distances were computed before the scores.
  s, first = lax.optimization_barrier((s, first))
  distances = _iota(s.shape, 1) + softmax.across(first, s.shape)
  slopes = softmax.across(slopes, s.shape)
  return s + slopes * distances.astype(jnp.float32)


def _tree_of_rows(work, base, column):
  """Returns `from_last` and `sees_new` of `VisitedTiles.sees`, per element.

  Args:
    work: The item.
    base: First position of the KV tile.
    column: i32[ROWS, block_kv], column numbers.
  """
  problem, tree = work.problem, work.inputs.tree.of_rows
  row = work.item.tile.token * problem.group
  rows = pl.ds(row + lax.axis_index("warpgroup") * ROWS, ROWS)
  load = lambda i: plgpu.load(
    tree.at[i, rows], layout=softmax.QUERIES, optimized=False
  )
  last, first = tree.shape[0] - 1, work.tiles.nth_new(base)
  words = tree_bits.aligned(load, last, first, problem.config.block_kv)
  from_last = 0
  if problem.spec.sliding_window is not None:
    from_last = softmax.across(load(last), column.shape)
  return from_last, tree_bits.spread(words, column, [0])


def _tree_of_seq(work, base, rows):
  """Returns whether at least one query sees the new token at each row of V.

  The result is arbitrary for rows that hold no new token.
  """
  words_gmem, seq = work.inputs.tree.of_seqs, work.item.tile.seq
  load = lambda i: words_gmem[seq, i]
  words = tree_bits.aligned(
    load,
    words_gmem.shape[1],
    work.tiles.nth_new(base),
    work.problem.config.block_kv,
  )
  return tree_bits.spread(words, rows, [])


def _are_mapped(work, base, positions):
  """Returns a mask of positions in mapped pages.

  Args:
    work: The item.
    base: First position of the KV tile.
    positions: i32, positions in the tile.
  """
  bits = mapped_bits(page_ids(work, base), work.problem.num_pages)
  bits = lax.broadcast_in_dim(bits, positions.shape, [])
  return ((bits >> (positions >> _log2(work.problem.chunk))) & 1) != 0


def _log2(power: int) -> int:
  return int(math.log2(power))


def _wait_for_v(work, i):
  """Waits for V of the i-th tile, and zeroes the rows that no query sees."""
  # 1. Does some query see each row of V? All consumers get the same answer.
  problem, tiles, base = work.problem, work.tiles, work.base(i)
  spec, stage, wg = problem.spec, work.stage(i), lax.axis_index("warpgroup")
  end = base + problem.config.block_kv
  is_clean = (end <= tiles.kv_end) & (work.item.tile.has_holes == 0)
  if work.inputs.tree is not None:
    is_clean &= end <= tiles.kv_len - tiles.num_new
  if spec.sliding_window is not None:
    first = tiles.kv_len - tiles.num_earlier - spec.sliding_window
    is_clean &= (base >= first) | (end <= spec.num_sink_tokens)
  plgpu.barrier_wait(work.smem.v.loaded.at[stage])

  # 2. If not, the first consumer zeroes the other rows; all consumers wait.
  @pl.when(jnp.logical_not(is_clean))
  def _():
    pl.when(wg == 0)(lambda: _zero_unseen_rows(work, stage, base))
    if problem.config.num_compute_wgs > 1:
      # One barrier per stage: the first warpgroup may be a tile ahead.
      cleaned = work.smem.v_cleaned.at[stage]
      pl.when(wg == 0)(lambda: plgpu.barrier_arrive(cleaned))
      pl.when(wg > 0)(lambda: plgpu.barrier_wait(cleaned))


def _zero_unseen_rows(work, stage, base):
  """Zeroes the rows of V that no query of the item sees."""
  v_smem, head_dim = work.smem.v.tiles.at[stage], work.problem.head_dim
  for column in range(0, head_dim, _COLUMNS):
    v = v_smem.at[:, pl.ds(column, min(_COLUMNS, head_dim - column))]
    rows = _iota(v.shape, 0)
    sees_new = None
    if work.inputs.tree is not None:
      sees_new = _tree_of_seq(work, base, rows)
    sees = work.tiles.are_seen(base + rows, sees_new)
    sees &= _are_mapped(work, base, rows)
    v[...] = jnp.where(sees, v[...], 0.0)
  plgpu.commit_smem()
