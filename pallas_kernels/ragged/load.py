"""The warpgroup of the ragged kernel that copies Q, K and V."""

import functools
import itertools
from collections.abc import Iterable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import kv_tiles, warps
from pallas_kernels.common.warps import Share
from pallas_kernels.ragged.problem import Count, Problem, Work


def run(problem: Problem, smem, walk) -> None:
  """Loads all items of a program.

  Args:
    problem: what is static.
    smem: shared memory and barriers.
    walk: calls a function with each `Work`, and returns their `Count`.
  """
  for_each_warp = functools.partial(
    warps.for_each_warp,
    whole(problem),
    first_thread=problem.config.num_compute_wgs,
    interpret=problem.interpret,
  )
  count = walk(lambda work: for_each_warp(functools.partial(_load_item, work)))
  for_each_warp(functools.partial(drain, problem, smem, count))


def whole(problem: Problem) -> Share:
  """Returns all there is to copy."""
  chunks = list(range(problem.num_chunks))
  num_columns = problem.head_dim // problem.columns
  wgs = range(problem.config.num_compute_wgs)
  return Share(chunks, chunks, list(itertools.product(wgs, range(num_columns))))


def drain(problem: Problem, smem, count: Count, share: Share) -> None:
  """Waits until all tiles of a program, and their queries, were taken.

  No barrier may be left with a completion that nobody waited for.
  """

  def drain_ring(consumed, num_stages, num):
    @pl.loop(jnp.maximum(num - num_stages, 0), num)
    def _(i):
      plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(num_stages))])

  config = problem.config
  if share.q:
    drain_ring(smem.q_consumed, config.num_q_stages, count.num_items)
  if share.k:
    drain_ring(smem.k_consumed, config.num_stages, count.num_tiles)
  if share.v:
    drain_ring(smem.v_consumed, config.num_stages, count.num_tiles)


def page_ids(work: Work, base, chunks: Iterable[int] | None = None) -> list:
  """Returns the page of chunks of the tile at a position, of all if None."""
  problem = work.problem
  if chunks is None:
    chunks = range(problem.num_chunks)
  sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
  table, seq = work.gmem.table, work.item.tile.seq
  return kv_tiles.page_ids(table, seq, base, chunks, **sizes)


def _load_item(work, share):
  """Copies Q, and the tiles of K and V into their rings, or a part of them."""
  chunks = share.chunks
  # With room for one Q, K comes first: there may be room for it before.
  is_q_first = work.problem.config.num_q_stages > 1

  # The page ids of the next tile are on their way while this one waits.
  def load(i, ids):
    next_ids = page_ids(work, work.base(i + 1), chunks)
    k_pages, v_pages = share.pages(ids)
    load_q = functools.partial(load_queries, work, share.q)
    if is_q_first:
      pl.when(i == 0)(load_q)
    _load_tile(work, "k", i, k_pages)
    if not is_q_first:
      pl.when(i == 0)(load_q)
    _load_tile(work, "v", i, v_pages)
    return next_ids

  ids = page_ids(work, work.base(0), chunks)
  lax.fori_loop(0, work.item.num_tiles, load, ids)


def load_queries(work: Work, places: list[tuple[int, int]]) -> None:
  """Copies parts of Q: columns of tiles of warpgroups that compute.

  Past the last token, there are zeros.
  """
  if not places:
    return  # nor wait, see `warps.for_each_warp`
  problem, smem, item, slot = work.problem, work.smem, work.item, work.q_slot

  @pl.when(work.before.num_items >= problem.config.num_q_stages)
  def _():
    plgpu.barrier_wait(smem.q_consumed.at[slot])

  by_token, _ = smem.q_smem
  for wg, i in places:
    first, heads = problem.rows_of(wg)
    tokens = pl.ds(item.tile.token + first, problem.wg_tokens)
    columns = pl.ds(i * problem.columns, problem.columns)
    source = work.gmem.q.at[tokens, item.head, heads, columns]
    place = by_token.at[slot, wg, i]
    plgpu.copy_gmem_to_smem(source, place, smem.q_loaded.at[slot])


def _load_tile(work, which, i, pages):
  """Copies chunks of the i-th tile of K or of V into its ring.

  Args:
    work: the item.
    which: "k" or "v".
    i: the tile.
    pages: the page of each chunk to copy.
  """
  if not pages:
    return  # nor wait
  problem, slot, base = work.problem, work.slot(i), work.base(i)
  source, chunk = getattr(work.gmem, which), problem.chunk
  ring, loaded, consumed = (
    getattr(work.smem, f"{which}_{name}")
    for name in ("smem", "loaded", "consumed")
  )

  @pl.when(work.before.num_tiles + i >= problem.config.num_stages)
  def _():
    plgpu.barrier_wait(consumed.at[slot])

  for j, page in pages.items():
    page = jnp.clip(page, 0, problem.num_pages - 1)
    rows = source.at[page, work.item.head]
    if chunk < problem.page_size:
      row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
      rows = source.at[page, work.item.head, pl.ds(row, chunk)]
    place = ring.at[slot, pl.ds(j * chunk, chunk)]
    plgpu.copy_gmem_to_smem(rows, place, loaded.at[slot])
