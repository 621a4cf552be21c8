"""Ragged: the producer warpgroup for 8-bit pages.

wgmma needs K and V in the dtype of Q. The producer, which is idle most of the
time, therefore dequantises them: it copies slices of 8-bit tiles and their
scales to a small staging ring, multiplies elements by scales, and writes the
products to the ring of the consumers. The consumers see the same tile as from a
pool that holds `data * scale`, rounded.

  pages    |p7|p2|p9|p4|  one copy each, and one for the scales
  staging  | K 0 | K 1 | V 0 | V 1 |     slices of tiles, 8 bits
  ring     |   tile of K    |   tile of V    |        16 bits

After a slice is dequantised, the slice `num_staged` further on is copied into
its stage.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.common.gpu import WARPS
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.ragged import dequantise, load
from pallas_kernels.ragged.problem import RaggedProblem, Ring, Scratch, Work

_NUM_IN_FLIGHT = 2  # see `dequantise.dequantise`; with four, registers spill


def run(
  problem: RaggedProblem, smem: Scratch, for_each_item: load.ForEachItem
) -> None:
  """Runs the producer warpgroup for 8-bit pages; see `load.run`."""
  copies = load.all_copies(problem)
  load.drain(problem, smem, for_each_item(_load_item), copies)


def _load_item(work: Work) -> None:
  """Copies Q, and copies and dequantises the K and V tiles of an item."""
  ids = load.page_ids(work, work.base(0))

  # 1. Fill the staging ring with the first slices, then copy Q.
  @pl.when(work.item.num_tiles > 0)
  def _():
    for nth in range(work.problem.num_staged):
      _copy_slice(work, 0, ids, nth)
    load.load_queries(work, load.all_copies(work.problem).q)

  # 2. Slice by slice: dequantise, then refill the stage. The page ids of the
  # next tile are loaded first, so that their latency overlaps.
  def load_tile(i, ids):
    next_ids = load.page_ids(work, work.base(i + 1))
    for nth in range(_num_slices(work.problem)):
      _dequantise(work, i, nth)
      _prefetch_slice(work, i, ids, next_ids, nth + work.problem.num_staged)
    return next_ids

  lax.fori_loop(0, work.item.num_tiles, load_tile, ids)


def _num_slices(problem):
  """Returns the number of slices of a K tile and a V tile; K comes first."""
  return 2 * problem.config.block_kv // problem.staged_rows


def _origin(work, nth) -> tuple[KVArrays, Ring, int]:
  """Returns the source of the nth slice, its ring, and its row in the tile."""
  num_rows, block_kv = work.problem.staged_rows, work.problem.config.block_kv
  is_v, row = divmod(nth * num_rows, block_kv)
  if is_v:
    return work.inputs.v, work.smem.v, row
  return work.inputs.k, work.smem.k, row


def _prefetch_slice(work, i, ids, next_ids, nth):
  """Copies the nth slice, counted from the i-th tile on, if it exists."""
  num_slices = _num_slices(work.problem)
  if nth < num_slices:
    _copy_slice(work, i, ids, nth)
  else:
    pl.when(i + 1 < work.item.num_tiles)(
      lambda: _copy_slice(work, i + 1, next_ids, nth - num_slices)
    )


def _copy_slice(work, i, ids, nth):
  """Copies the nth slice of the i-th tile, and its scales.

  The four warps issue the copies of the chunks in turn.
  """
  problem, staging = work.problem, work.smem.staging
  assert staging is not None  # the pages are quantised
  stage = nth % problem.num_staged
  source, _, start = _origin(work, nth)
  assert source.scales is not None
  transfers = (
    (source.pages, staging.elements.at[stage]),
    (source.scales, staging.scales.at[stage]),
  )
  num_rows = min(problem.chunk, problem.staged_rows)
  base = work.base(i)

  def copy(row, page):
    at = load.rows_of_page(work, page, base + start + row, num_rows)
    for array, target in transfers:
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


def _dequantise(work, i, nth):
  """Dequantises the nth slice of the i-th tile into the consumers' ring."""
  problem, staging, stage = work.problem, work.smem.staging, work.stage(i)
  _, ring, row = _origin(work, nth)
  # 1. The first slice of a tile waits until the consumers release the stage.
  if row == 0:

    @pl.when(work.ring_is_full(i))
    def _():
      plgpu.barrier_wait(ring.consumed.at[stage])

  # 2. Wait for the copies of the slice, and dequantise it.
  staged = nth % problem.num_staged
  plgpu.barrier_wait(staging.loaded.at[staged])
  dequantise.dequantise(
    staging.elements.at[staged],
    staging.scales.at[staged],
    ring.tiles.at[stage],
    problem.transforms,
    first_row=row,
    num_in_flight=_NUM_IN_FLIGHT,
    interpreted=problem.interpret is not None,
  )
  # 3. After this, all threads have read the slice, so that its stage may be
  # overwritten, and wgmma sees what they wrote.
  plgpu.commit_smem()
  if row + problem.staged_rows == problem.config.block_kv:
    plgpu.barrier_arrive(ring.loaded.at[stage])
