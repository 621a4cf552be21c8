"""Decode: rings of KV tiles in shared memory, one for K and one for V.

The producer warps fill a stage chunk by chunk (`load`). The consumer warpgroup
waits for it, uses the tile as a wgmma operand (or loads it into registers if it
holds 8-bit elements), and releases the stage. Quantised tiles have their scales
in the same stage. The caller multiplies the scores by the scales, because there
are fewer scores than elements.

  pages    |p7|p2|p9|p4|  one copy each         (and one for their scales)
  ring     |  tile 4   |  tile 5   |  tile 3   |         num_stages tiles
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.kv_tiles import page_row
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.common.warps import Copies
from pallas_kernels.decode import fragments
from pallas_kernels.decode.problem import DecodeProblem, Ring, Scratch


def load(
  problem: DecodeProblem, source: KVArrays, ring: Ring, at, pages
) -> None:
  """Copies chunks of a tile into a ring, in one producer warp.

  Args:
    problem: The static sizes.
    source: K or V in global memory.
    ring: Its ring.
    at: KV head; layer or None; index of the tile in the program; its first
      position.
    pages: The page id of each chunk to copy, by chunk number.
  """
  if not pages:
    return  # without a wait, see `warps.for_each_warp`
  head, layer, nth, base = at
  stage = _stage(problem, nth)

  @pl.when(nth >= problem.config.num_stages)
  def _():
    plgpu.barrier_wait(ring.consumed.at[stage])

  for j, page in pages.items():
    row = page_row(page, layer, problem.num_pages, problem.num_layers)
    _copy_chunk(problem, source, ring, (row, head), stage, base, j)


def _copy_chunk(problem, source, ring, page_head, stage, base, j):
  """Copies the j-th chunk of a tile, and its scales."""
  chunk, rows = problem.chunk, ()
  # Indexing a whole page gives a simpler copy than slicing all of its rows.
  if chunk < problem.page_size:
    row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
    rows = (pl.ds(row, chunk),)
  at, target_rows = (*page_head, *rows), (stage, pl.ds(j * chunk, chunk))
  target = ring.tiles.at[*target_rows, pl.ds(0, problem.head_dim)]
  is_row_major = problem.is_quantised and not fragments.transforms(
    problem.head_dim
  )
  copy = _bulk_copy if is_row_major else plgpu.copy_gmem_to_smem
  copy(source.pages.at[at], target, ring.loaded.at[stage])
  if source.scales is not None and ring.scales is not None:
    scales = ring.scales.at[target_rows]
    _bulk_copy(source.scales.at[at], scales, ring.loaded.at[stage])


def _bulk_copy(source, target, barrier):
  """Copies contiguous rows by cp.async.bulk, which needs no tensor map."""
  mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
  plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=mode)


def drain(
  problem: DecodeProblem, smem: Scratch, num_tiles, copies: Copies
) -> None:
  """Waits until the consumer has read the last tiles of the program.

  When a program ends, no barrier may have a completed phase that no thread has
  waited for. A warp waits only on the rings to which it copies.

  Args:
    problem: The static sizes.
    smem: Shared memory and barriers.
    num_tiles: Tiles that the program has attended.
    copies: The copies of the calling warp.
  """
  rings = [
    x for x, chunks in ((smem.k, copies.k), (smem.v, copies.v)) if chunks
  ]

  @pl.loop(jnp.maximum(num_tiles - problem.config.num_stages, 0), num_tiles)
  def _(nth):
    for ring in rings:
      plgpu.barrier_wait(ring.consumed.at[_stage(problem, nth)])


def wait(problem: DecodeProblem, ring: Ring, nth) -> None:
  """Waits in the consumer until the program's nth tile is loaded."""
  plgpu.barrier_wait(ring.loaded.at[_stage(problem, nth)])


def tile(problem: DecodeProblem, ring: Ring, nth):
  """Returns a reference to the program's nth tile."""
  return ring.tiles.at[_stage(problem, nth)]


def scales(problem: DecodeProblem, ring: Ring, nth):
  """Returns f32[block_kv], the scales of the program's nth tile."""
  assert ring.scales is not None  # the pages are quantised
  return plgpu.load(
    ring.scales.at[_stage(problem, nth)],
    layout=fragments.ROWS,
    optimized=False,
  )


def release(problem: DecodeProblem, ring: Ring, nth) -> None:
  """Releases the stage of the program's nth tile to the producer."""
  plgpu.barrier_arrive(ring.consumed.at[_stage(problem, nth)])


def _stage(problem, nth):
  return lax.rem(nth, jnp.int32(problem.config.num_stages))
