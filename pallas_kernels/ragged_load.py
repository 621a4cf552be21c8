"""The warpgroup of the ragged kernel that copies Q, K and V."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_problem import Problem, Work


def run(problem: Problem, smem, walk) -> None:
  """Loads all items of a program.

  Args:
    problem: what is static.
    smem: shared memory and barriers.
    walk: calls a function with each `Work`, and returns the tiles of all.
  """
  drain(problem, smem, walk(_load_item))


def drain(problem: Problem, smem, num_tiles) -> None:
  """Waits until all tiles of a program, and their queries, were taken.

  No barrier may be left with a completion that nobody waited for.
  """
  num_stages = problem.config.num_stages

  @pl.when(num_tiles > 0)
  def _():
    plgpu.barrier_wait(smem.q_consumed)

  @pl.loop(jnp.maximum(num_tiles - num_stages, 0), num_tiles)
  def _(i):
    slot = lax.rem(i, jnp.int32(num_stages))
    plgpu.barrier_wait(smem.k_consumed.at[slot])
    plgpu.barrier_wait(smem.v_consumed.at[slot])


def page_ids(work: Work, base) -> list:
  """Returns the page of each chunk of the tile at a position.

  Past the table's end, it is any page: it will be masked.
  """
  problem = work.problem
  starts = (base + j * problem.chunk for j in range(problem.num_chunks))
  columns = [lax.div(start, jnp.int32(problem.page_size)) for start in starts]
  last, seq = problem.pages_per_seq - 1, work.item.tile.seq
  return [work.gmem.table[seq, jnp.minimum(column, last)] for column in columns]


def _load_item(work):
  """Copies Q, and the tiles of K and V into their rings."""
  ids = page_ids(work, work.base(0))

  @pl.when(work.item.num_tiles > 0)
  def _():
    # There may be room for K while Q is still taken.
    _load_tile(work, "k", 0, ids)
    load_queries(work)
    _load_tile(work, "v", 0, ids)

  # The page ids of the next tile are on their way while this one waits.
  def load(i, ids):
    next_ids = page_ids(work, work.base(i + 1))
    _load_tile(work, "k", i, ids)
    _load_tile(work, "v", i, ids)
    return next_ids

  ids = page_ids(work, work.base(1))
  lax.fori_loop(1, work.item.num_tiles, load, ids)


def load_queries(work: Work) -> None:
  """Copies the queries of an item; past the last token, there are zeros."""
  problem, item = work.problem, work.item
  pl.when(work.num_before > 0)(lambda: plgpu.barrier_wait(work.smem.q_consumed))
  by_token, _ = work.smem.q_smem
  for wg in range(by_token.shape[0]):
    first, heads = problem.rows_of(wg)
    tokens = pl.ds(item.tile.token + first, problem.wg_tokens)
    for i in range(by_token.shape[1]):
      columns = pl.ds(i * problem.columns, problem.columns)
      source = work.gmem.q.at[tokens, item.head, heads, columns]
      plgpu.copy_gmem_to_smem(source, by_token.at[wg, i], work.smem.q_loaded)


def _load_tile(work, which, i, ids):
  """Copies the i-th tile of K or of V into its ring."""
  problem, slot, base = work.problem, work.slot(i), work.base(i)
  source, chunk = getattr(work.gmem, which), problem.chunk
  ring, loaded, consumed = (
    getattr(work.smem, f"{which}_{name}")
    for name in ("smem", "loaded", "consumed")
  )

  @pl.when(work.num_before + i >= problem.config.num_stages)
  def _():
    plgpu.barrier_wait(consumed.at[slot])

  for j, page in enumerate(ids):
    page = jnp.clip(page, 0, problem.num_pages - 1)
    rows = source.at[page, work.item.head]
    if chunk < problem.page_size:
      row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
      rows = source.at[page, work.item.head, pl.ds(row, chunk)]
    place = ring.at[slot, pl.ds(j * chunk, chunk)]
    plgpu.copy_gmem_to_smem(rows, place, loaded.at[slot])
