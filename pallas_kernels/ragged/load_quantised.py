"""The warpgroup of the ragged kernel that copies, for 8-bit numbers.

wgmma wants K and V in the dtype of Q. The warpgroup, which else waits most of
the time, therefore has 8-bit numbers and their scales copied to a small ring of
its own, multiplies them, and writes the products where the others look for a
tile: they see one as it would be of a pool that held `data * scale`, rounded.

  pages    |p7|p2|p9|p4|  a copy each, and one for the scales
  staged   | K 0 | K 1 | V 0 | V 1 |     pieces of tiles, of 8 bits
  ring     |   tile of K    |   tile of V    |        of 16 bits

As soon as a piece was read, the one that is `num_staged` ahead takes its place.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.gpu import WARPS
from pallas_kernels.ragged import load, widen
from pallas_kernels.ragged.problem import Problem

_AHEAD = 2  # see `widen`; with four, registers spill


def run(problem: Problem, smem, walk) -> None:
  """Loads all items of a program; see `load.run`."""
  share = load.whole(problem)
  load.drain(problem, smem, walk(_load_item), share)


def _load_item(work):
  """Copies Q, and copies and widens the tiles of K and V."""
  ids = load.page_ids(work, work.base(0))

  @pl.when(work.item.num_tiles > 0)
  def _():
    for piece in range(work.problem.num_staged):
      _stage(work, 0, ids, piece)
    load.load_queries(work, load.whole(work.problem).q)

  def load_tile(i, ids):
    next_ids = load.page_ids(work, work.base(i + 1))
    for piece in range(_num_pieces(work.problem)):
      _widen(work, i, piece)
      _stage_ahead(work, i, ids, next_ids, piece + work.problem.num_staged)
    return next_ids

  lax.fori_loop(0, work.item.num_tiles, load_tile, ids)


def _num_pieces(problem):
  """Returns the pieces of a tile: those of K, and then those of V."""
  return 2 * problem.config.block_kv // problem.staged_rows


def _of(problem, gmem, smem, piece):
  """Returns what a piece is of, the barriers of its tile, and its first row."""
  num_rows, block_kv = problem.staged_rows, problem.config.block_kv
  is_v, row = divmod(piece * num_rows, block_kv)
  if is_v:
    pages = gmem.v, gmem.v_scales
    return pages, smem.v_smem, (smem.v_loaded, smem.v_consumed), row
  pages = gmem.k, gmem.k_scales
  return pages, smem.k_smem, (smem.k_loaded, smem.k_consumed), row


def _stage_ahead(work, i, ids, next_ids, piece):
  """Copies a piece of the i-th tile, or of the next, if there is one."""
  num_pieces = _num_pieces(work.problem)
  if piece < num_pieces:
    _stage(work, i, ids, piece)
  else:
    pl.when(i + 1 < work.item.num_tiles)(
      lambda: _stage(work, i + 1, next_ids, piece - num_pieces)
    )


def _stage(work, i, ids, piece):
  """Copies a piece of the i-th tile, and its scales: some chunks each warp."""
  problem, smem = work.problem, work.smem
  slot = piece % problem.num_staged
  sources, *_, start = _of(problem, work.gmem, smem, piece)
  places = smem.staged_smem.at[slot], smem.staged_scales_smem.at[slot]
  num_rows = min(problem.chunk, problem.staged_rows)
  base = work.base(i)

  def copy(row, page):
    first = lax.rem(base + start + row, jnp.int32(problem.page_size))
    # The page as a whole is a simpler copy than all of its rows.
    rows = (pl.ds(first, num_rows),) if num_rows < problem.page_size else ()
    page = jnp.clip(page, 0, problem.num_pages - 1)
    for source, place in zip(sources, places, strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[page, work.item.head, *rows],
        place.at[pl.ds(row, num_rows)],
        smem.staged.at[slot],
        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
      )

  @plgpu.warp_map
  def _(warp):
    for j, row in enumerate(range(0, problem.staged_rows, num_rows)):
      page = ids[(start + row) // problem.chunk]
      pl.when(warp == j % WARPS)(lambda row=row, page=page: copy(row, page))


def _widen(work, i, piece):
  """Widens a piece of the i-th tile into its ring, when there is room."""
  problem, smem, slot = work.problem, work.smem, work.slot(i)
  _, ring, (loaded, consumed), row = _of(problem, work.gmem, smem, piece)
  if row == 0:

    @pl.when(work.before.num_tiles + i >= problem.config.num_stages)
    def _():
      plgpu.barrier_wait(consumed.at[slot])

  staged = piece % problem.num_staged
  plgpu.barrier_wait(smem.staged.at[staged])
  widen.scaled(
    smem.staged_smem.at[staged],
    smem.staged_scales_smem.at[staged],
    ring.at[slot],
    problem.transforms,
    first_row=row,
    ahead=_AHEAD,
    interpreted=problem.interpret is not None,
  )
  # All threads have read the piece, and wgmma will see what they wrote.
  plgpu.commit_smem()
  if row + problem.staged_rows == problem.config.block_kv:
    plgpu.barrier_arrive(loaded.at[slot])
