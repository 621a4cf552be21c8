"""The rings of KV tiles in shared memory, between a copy and a product.

The warps of the producer warpgroup fill them, each its part; the consumer
warpgroup takes a tile, as an operand of wgmma, or through registers if it is of
8-bit numbers. The scales of its tokens come in rings of their own. The caller
applies the scales to the scores, of which there are fewer than elements.

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
  """Copies chunks of a tile into a ring.

  Args:
    problem: The static facts.
    source: K or V in global memory.
    ring: Its ring.
    at: KV head; layer, or None; number of the tile in the program; its first
      position.
    pages: The page of each chunk to copy, by chunk.
  """
  if not pages:
    return  # and do not wait, see `warps.for_each_warp`
  head, layer, nth, base = at
  stage = _stage(problem, nth)

  @pl.when(nth >= problem.config.num_stages)
  def _():
    plgpu.barrier_wait(ring.consumed.at[stage])

  for j, page in pages.items():
    row = page_row(page, layer, problem.num_pages, problem.num_layers)
    _copy_chunk(problem, source, ring, (row, head), stage, base, j)


def _copy_chunk(problem, source, ring, page_head, stage, base, j):
  """Copies the jth chunk of a tile, and its scales."""
  chunk, rows = problem.chunk, ()
  # The page as a whole is a simpler copy than all of its rows.
  if chunk < problem.page_size:
    row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
    rows = (pl.ds(row, chunk),)
  at, place = (*page_head, *rows), (stage, pl.ds(j * chunk, chunk))
  target = ring.tiles.at[*place, pl.ds(0, problem.head_dim)]
  is_row_by_row = problem.is_quantised and not fragments.transforms(
    problem.head_dim
  )
  copy = _copy_row_by_row if is_row_by_row else plgpu.copy_gmem_to_smem
  copy(source.pages.at[at], target, ring.loaded.at[stage])
  if source.scales is not None and ring.scales is not None:
    scales = ring.scales.at[place]
    _copy_row_by_row(source.scales.at[at], scales, ring.loaded.at[stage])


def _copy_row_by_row(source, target, barrier):
  """Copies rows that TMA's tiles cannot hold."""
  mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
  plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=mode)


def drain(
  problem: DecodeProblem, smem: Scratch, num_tiles, copies: Copies
) -> None:
  """Waits until all tiles were read, in the rings to which a warp copies.

  No barrier may be left with a completion that nobody waited for.
  """
  rings = [
    x for x, chunks in ((smem.k, copies.k), (smem.v, copies.v)) if chunks
  ]

  @pl.loop(jnp.maximum(num_tiles - problem.config.num_stages, 0), num_tiles)
  def _(nth):
    for ring in rings:
      plgpu.barrier_wait(ring.consumed.at[_stage(problem, nth)])


def wait(problem: DecodeProblem, ring: Ring, nth) -> None:
  """Waits for the program's nth tile."""
  plgpu.barrier_wait(ring.loaded.at[_stage(problem, nth)])


def tile(problem: DecodeProblem, ring: Ring, nth):
  """Returns the program's nth tile."""
  return ring.tiles.at[_stage(problem, nth)]


def scales(problem: DecodeProblem, ring: Ring, nth):
  """Returns the scales of the rows of a tile of 8-bit numbers."""
  assert ring.scales is not None  # the pages are quantised
  return plgpu.load(
    ring.scales.at[_stage(problem, nth)],
    layout=fragments.ROWS,
    optimized=False,
  )


def give_back(problem: DecodeProblem, ring: Ring, nth) -> None:
  """Lets the next tile take the place of one in the ring."""
  plgpu.barrier_arrive(ring.consumed.at[_stage(problem, nth)])


def _stage(problem, nth):
  return lax.rem(nth, jnp.int32(problem.config.num_stages))
