"""Ragged: the producer warpgroup, which copies Q, K and V of each item."""

import functools
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import kv_tiles, warps
from pallas_kernels.common.kv_tiles import page_row
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.common.warps import Copies
from pallas_kernels.ragged.problem import (
  Count,
  RaggedProblem,
  Ring,
  Scratch,
  Work,
)

type ForEachItem = Callable[[Callable[[Work], None]], Count]


def run(
  problem: RaggedProblem, smem: Scratch, for_each_item: ForEachItem
) -> None:
  """Runs the producer warpgroup: copies Q, K and V of all items.

  Args:
    problem: The static sizes.
    smem: Shared memory and barriers.
    for_each_item: Calls a function with each `Work`, and returns the `Count`.
  """
  for_each_warp = functools.partial(
    warps.for_each_warp,
    all_copies(problem),
    first_thread=problem.config.num_compute_wgs,
    interpret=problem.interpret,
  )
  count = for_each_item(
    lambda work: for_each_warp(functools.partial(_load_item, work))
  )
  for_each_warp(functools.partial(drain, problem, smem, count))


def all_copies(problem: RaggedProblem) -> Copies:
  """Returns all copies of the warpgroup.

  A part of Q is (consumer warpgroup, column of tiles).

  Args:
    problem: The static sizes.
  """
  chunks = list(range(problem.num_chunks))
  num_columns = problem.head_dim // problem.columns
  wgs = range(problem.config.num_compute_wgs)
  return Copies(
    chunks, chunks, list(itertools.product(wgs, range(num_columns)))
  )


def drain(
  problem: RaggedProblem, smem: Scratch, count: Count, copies: Copies
) -> None:
  """Waits until the consumers have read the last Q, K and V of the program.

  When a program ends, no barrier may have a completed phase that no thread has
  waited for. A warp waits only on the rings to which it copies.

  Args:
    problem: The static sizes.
    smem: Shared memory and barriers.
    count: Items and KV tiles that the program has attended.
    copies: The copies of the calling warp, or of the warpgroup.
  """

  def drain_ring(consumed, num_stages, num):
    @pl.loop(jnp.maximum(num - num_stages, 0), num)
    def _(i):
      plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(num_stages))])

  config = problem.config
  if copies.q:
    drain_ring(smem.q_consumed, config.num_q_stages, count.num_items)
  if copies.k:
    drain_ring(smem.k.consumed, config.num_stages, count.num_tiles)
  if copies.v:
    drain_ring(smem.v.consumed, config.num_stages, count.num_tiles)


def page_ids(
  work: Work, base, chunks: Iterable[int] | None = None
) -> list[jax.Array]:
  """Reads the page ids of chunks of a KV tile; see `kv_tiles.page_ids`.

  Args:
    work: The item.
    base: First position of the tile.
    chunks: Chunk numbers; None: all.
  """
  problem = work.problem
  if chunks is None:
    chunks = range(problem.num_chunks)
  sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
  table, seq = work.inputs.page_indices, work.item.tile.seq
  return kv_tiles.page_ids(table, seq, base, chunks, **sizes)


def rows_of_page(work: Work, page, first, num_rows: int) -> tuple:
  """Returns the index of consecutive rows in the flat pool.

  Args:
    work: The item, which gives layer and KV head.
    page: Page id.
    first: Position of the first row.
    num_rows: Number of rows; they do not straddle the page.
  """
  problem = work.problem
  row = page_row(page, work.layer, problem.num_pages, problem.num_layers)
  # Indexing a whole page gives a simpler copy than slicing all of its rows.
  if num_rows == problem.page_size:
    return row, work.item.head
  offset = lax.rem(first, jnp.int32(problem.page_size))
  return row, work.item.head, pl.ds(offset, num_rows)


def _load_item(work, copies):
  """Issues the copies of one warp: Q, and the K and V tiles of an item."""
  chunks = copies.chunks
  # With one stage, Q waits for the previous item to end; K may not have to.
  is_q_first = work.problem.config.num_q_stages > 1

  def load(i, ids):
    # 1. Load the next page ids first: their latency overlaps with the waits.
    next_ids = page_ids(work, work.base(i + 1), chunks)
    k_pages, v_pages = copies.pages(ids)
    load_q = functools.partial(load_queries, work, copies.q)
    # 2. Q with the first tile, and K: the consumers need both for Q K^T.
    if is_q_first:
      pl.when(i == 0)(load_q)
    _load_tile(work, work.inputs.k, work.smem.k, i, k_pages)
    if not is_q_first:
      pl.when(i == 0)(load_q)
    # 3. V last: the consumers need it only after the softmax.
    _load_tile(work, work.inputs.v, work.smem.v, i, v_pages)
    return next_ids

  ids = page_ids(work, work.base(0), chunks)
  lax.fori_loop(0, work.item.num_tiles, load, ids)


def load_queries(work: Work, parts: list[tuple[int, int]]) -> None:
  """Copies parts of Q; TMA fills rows past the last token with zeros.

  Args:
    work: The item.
    parts: Parts of Q: (consumer warpgroup, column of tiles).
  """
  if not parts:
    return  # without a wait, see `warps.for_each_warp`
  problem, smem, item, stage = work.problem, work.smem, work.item, work.q_stage

  @pl.when(work.done.num_items >= problem.config.num_q_stages)
  def _():
    plgpu.barrier_wait(smem.q_consumed.at[stage])

  by_token, _ = smem.q
  for wg, i in parts:
    first, heads = problem.rows_of(wg)
    tokens = pl.ds(item.tile.token + first, problem.wg_tokens)
    columns = pl.ds(i * problem.columns, problem.columns)
    source = work.inputs.q.at[tokens, item.head, heads, columns]
    target = by_token.at[stage, wg, i]
    plgpu.copy_gmem_to_smem(source, target, smem.q_loaded.at[stage])


def _load_tile(work, source: KVArrays, ring: Ring, i, pages):
  """Copies chunks of the i-th tile of K or of V into its ring.

  Args:
    work: The item.
    source: K or V in global memory.
    ring: Its ring.
    i: Index of the tile in the item.
    pages: The page id of each chunk to copy, by chunk number.
  """
  if not pages:
    return  # without a wait, see `warps.for_each_warp`
  stage, base, chunk = work.stage(i), work.base(i), work.problem.chunk

  @pl.when(work.ring_is_full(i))
  def _():
    plgpu.barrier_wait(ring.consumed.at[stage])

  for j, page in pages.items():
    rows = source.pages.at[rows_of_page(work, page, base + j * chunk, chunk)]
    target = ring.tiles.at[stage, pl.ds(j * chunk, chunk)]
    plgpu.copy_gmem_to_smem(rows, target, ring.loaded.at[stage])
