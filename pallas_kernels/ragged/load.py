"""Ragged: the producer warpgroup, which copies Q, K and V."""

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

type Walk = Callable[[Callable[[Work], None]], Count]


def run(problem: RaggedProblem, smem: Scratch, walk: Walk) -> None:
  """Loads all items of a program.

  Args:
    problem: The static facts.
    smem: Shared memory and barriers.
    walk: Calls a function with each `Work`, and returns their `Count`.
  """
  for_each_warp = functools.partial(
    warps.for_each_warp,
    all_copies(problem),
    first_thread=problem.config.num_compute_wgs,
    interpret=problem.interpret,
  )
  count = walk(lambda work: for_each_warp(functools.partial(_load_item, work)))
  for_each_warp(functools.partial(drain, problem, smem, count))


def all_copies(problem: RaggedProblem) -> Copies:
  """Returns everything that the warpgroup copies of an item."""
  chunks = list(range(problem.num_chunks))
  num_columns = problem.head_dim // problem.columns
  wgs = range(problem.config.num_compute_wgs)
  return Copies(
    chunks, chunks, list(itertools.product(wgs, range(num_columns)))
  )


def drain(
  problem: RaggedProblem, smem: Scratch, count: Count, copies: Copies
) -> None:
  """Waits until all tiles of a program, and their queries, were read.

  No barrier may be left with a completion that nobody waited for.
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
  """Returns the page of chunks of the tile at a position, of all if None."""
  problem = work.problem
  if chunks is None:
    chunks = range(problem.num_chunks)
  sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
  table, seq = work.inputs.page_indices, work.item.tile.seq
  return kv_tiles.page_ids(table, seq, base, chunks, **sizes)


def rows_of_page(work: Work, page, first, num_rows: int) -> tuple:
  """Returns the index of rows of a page, of the item's layer and KV head.

  Args:
    work: The item.
    page: The page.
    first: A position; the first row is that of this position.
    num_rows: How many rows.
  """
  problem = work.problem
  row = page_row(page, work.layer, problem.num_pages, problem.num_layers)
  # The page as a whole is a simpler copy than all of its rows.
  if num_rows == problem.page_size:
    return row, work.item.head
  offset = lax.rem(first, jnp.int32(problem.page_size))
  return row, work.item.head, pl.ds(offset, num_rows)


def _load_item(work, copies):
  """Copies Q, and the tiles of K and V into their rings, or a part of them."""
  chunks = copies.chunks
  # With room for one Q, K comes first: there may be room for it before.
  is_q_first = work.problem.config.num_q_stages > 1

  # The page ids of the next tile are loaded while this one waits.
  def load(i, ids):
    next_ids = page_ids(work, work.base(i + 1), chunks)
    k_pages, v_pages = copies.pages(ids)
    load_q = functools.partial(load_queries, work, copies.q)
    if is_q_first:
      pl.when(i == 0)(load_q)
    _load_tile(work, work.inputs.k, work.smem.k, i, k_pages)
    if not is_q_first:
      pl.when(i == 0)(load_q)
    _load_tile(work, work.inputs.v, work.smem.v, i, v_pages)
    return next_ids

  ids = page_ids(work, work.base(0), chunks)
  lax.fori_loop(0, work.item.num_tiles, load, ids)


def load_queries(work: Work, places: list[tuple[int, int]]) -> None:
  """Copies parts of Q: columns of tiles of warpgroups that compute.

  Past the last token, there are zeros.
  """
  if not places:
    return  # and do not wait, see `warps.for_each_warp`
  problem, smem, item, stage = work.problem, work.smem, work.item, work.q_stage

  @pl.when(work.before.num_items >= problem.config.num_q_stages)
  def _():
    plgpu.barrier_wait(smem.q_consumed.at[stage])

  by_token, _ = smem.q
  for wg, i in places:
    first, heads = problem.rows_of(wg)
    tokens = pl.ds(item.tile.token + first, problem.wg_tokens)
    columns = pl.ds(i * problem.columns, problem.columns)
    source = work.inputs.q.at[tokens, item.head, heads, columns]
    place = by_token.at[stage, wg, i]
    plgpu.copy_gmem_to_smem(source, place, smem.q_loaded.at[stage])


def _load_tile(work, source: KVArrays, ring: Ring, i, pages):
  """Copies chunks of the i-th tile of K or of V into its ring.

  Args:
    work: The item.
    source: K or V in global memory.
    ring: Its ring.
    i: Number of the tile in the item.
    pages: The page of each chunk to copy, by chunk.
  """
  if not pages:
    return  # and do not wait
  stage, base, chunk = work.stage(i), work.base(i), work.problem.chunk

  @pl.when(work.ring_is_full(i))
  def _():
    plgpu.barrier_wait(ring.consumed.at[stage])

  for j, page in pages.items():
    rows = source.pages.at[rows_of_page(work, page, base + j * chunk, chunk)]
    place = ring.tiles.at[stage, pl.ds(j * chunk, chunk)]
    plgpu.copy_gmem_to_smem(rows, place, ring.loaded.at[stage])
