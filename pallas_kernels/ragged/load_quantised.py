"""Ragged: the producer warpgroup for pages of 8-bit numbers.

wgmma wants K and V in the dtype of Q. The warpgroup, which otherwise waits most
of the time, therefore copies 8-bit numbers and their scales to a small ring of
its own, multiplies them, and writes the products where the consumers look for a
tile: they see one as it would be of a pool that held `data * scale`, rounded.

  pages    |p7|p2|p9|p4|  a copy each, and one for the scales
  staged   | K 0 | K 1 | V 0 | V 1 |     slices of tiles, of 8 bits
  ring     |   tile of K    |   tile of V    |        of 16 bits

As soon as a slice was read, the one that is `num_staged` ahead takes its place.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.common.gpu import WARPS
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.ragged import load, widen
from pallas_kernels.ragged.problem import RaggedProblem, Ring, Scratch, Work

_AHEAD = 2  # see `widen`; with four, registers spill


def run(problem: RaggedProblem, smem: Scratch, walk: load.Walk) -> None:
  """Loads all items of a program; see `load.run`."""
  copies = load.all_copies(problem)
  load.drain(problem, smem, walk(_load_item), copies)


def _load_item(work: Work) -> None:
  """Copies Q, and copies and widens the tiles of K and V."""
  ids = load.page_ids(work, work.base(0))

  @pl.when(work.item.num_tiles > 0)
  def _():
    for nth in range(work.problem.num_staged):
      _stage(work, 0, ids, nth)
    load.load_queries(work, load.all_copies(work.problem).q)

  def load_tile(i, ids):
    next_ids = load.page_ids(work, work.base(i + 1))
    for nth in range(_num_slices(work.problem)):
      _widen(work, i, nth)
      _stage_ahead(work, i, ids, next_ids, nth + work.problem.num_staged)
    return next_ids

  lax.fori_loop(0, work.item.num_tiles, load_tile, ids)


def _num_slices(problem):
  """Returns the slices of a tile of K and one of V; those of K come first."""
  return 2 * problem.config.block_kv // problem.staged_rows


def _of(work, nth) -> tuple[KVArrays, Ring, int]:
  """Returns what the nth slice is of, the ring of its tile, its first row."""
  num_rows, block_kv = work.problem.staged_rows, work.problem.config.block_kv
  is_v, row = divmod(nth * num_rows, block_kv)
  if is_v:
    return work.inputs.v, work.smem.v, row
  return work.inputs.k, work.smem.k, row


def _stage_ahead(work, i, ids, next_ids, nth):
  """Copies a slice of the i-th tile, or of the next, if there is one."""
  num_slices = _num_slices(work.problem)
  if nth < num_slices:
    _stage(work, i, ids, nth)
  else:
    pl.when(i + 1 < work.item.num_tiles)(
      lambda: _stage(work, i + 1, next_ids, nth - num_slices)
    )


def _stage(work, i, ids, nth):
  """Copies a slice of the i-th tile, and its scales: some chunks each warp."""
  problem, staging = work.problem, work.smem.staging
  assert staging is not None  # the pages are quantised
  stage = nth % problem.num_staged
  source, _, start = _of(work, nth)
  assert source.scales is not None
  moves = (
    (source.pages, staging.numbers.at[stage]),
    (source.scales, staging.scales.at[stage]),
  )
  num_rows = min(problem.chunk, problem.staged_rows)
  base = work.base(i)

  def copy(row, page):
    at = load.rows_of_page(work, page, base + start + row, num_rows)
    for array, target in moves:
      plgpu.copy_gmem_to_smem(
        array.at[at],
        target.at[pl.ds(row, num_rows)],
        staging.loaded.at[stage],
        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
      )

  @plgpu.warp_map
  def _(warp):
    for j, row in enumerate(range(0, problem.staged_rows, num_rows)):
      page = ids[(start + row) // problem.chunk]
      pl.when(warp == j % WARPS)(lambda row=row, page=page: copy(row, page))


def _widen(work, i, nth):
  """Widens a slice of the i-th tile into its ring, when there is room."""
  problem, staging, stage = work.problem, work.smem.staging, work.stage(i)
  _, ring, row = _of(work, nth)
  if row == 0:

    @pl.when(work.ring_is_full(i))
    def _():
      plgpu.barrier_wait(ring.consumed.at[stage])

  staged = nth % problem.num_staged
  plgpu.barrier_wait(staging.loaded.at[staged])
  widen.scaled(
    staging.numbers.at[staged],
    staging.scales.at[staged],
    ring.tiles.at[stage],
    problem.transforms,
    first_row=row,
    ahead=_AHEAD,
    interpreted=problem.interpret is not None,
  )
  # All threads have read the slice, and wgmma will see what they wrote.
  plgpu.commit_smem()
  if row + problem.staged_rows == problem.config.block_kv:
    plgpu.barrier_arrive(ring.loaded.at[stage])
