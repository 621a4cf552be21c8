"""The rings of KV tiles in shared memory, between a copy and a product.

The warps of the memory warpgroup fill them, each its share; the compute
warpgroup takes a tile, as an operand of wgmma, or through registers if it is of
8-bit numbers. The scales of their tokens come in rings of their own, and are
left to the caller, who has fewer scores than there are numbers.

  pages    |p7|p2|p9|p4|  one copy each         (and one for their scales)
  ring     |  tile 4   |  tile 5   |  tile 3   |         num_stages tiles
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.warps import Share
from pallas_kernels.decode import fragments
from pallas_kernels.decode.problem import Problem

K, V = "k", "v"


def mapped_chunks(problem: Problem, ids):
  """Returns a bit per chunk of a tile: whether its page is mapped."""
  mapped = [(page >= 0) & (page < problem.num_pages) for page in ids]
  return sum(bit.astype(jnp.int32) << j for j, bit in enumerate(mapped))


def load(problem: Problem, gmem, smem, head, nth, base, pages) -> None:
  """Copies chunks of the program's nth tile of K and of V into their rings.

  Args:
    problem: what is static.
    gmem: arrays in memory of the GPU.
    smem: what `scratch` asks for.
    head: the KV head.
    nth: the tile, of the program's.
    base: its first position.
    pages: of K and of V, the page of each chunk to copy, by chunk.
  """
  slot = _slot(problem, nth)
  for which, page_of in zip((K, V), pages, strict=True):
    if not page_of:
      continue  # nor wait, see `warps.for_each_warp`
    _, consumed = _barriers(smem, which)

    @pl.when(nth >= problem.config.num_stages)
    def _(consumed=consumed):
      plgpu.barrier_wait(consumed.at[slot])

    for j, page in page_of.items():
      _copy_chunk(problem, gmem, smem, which, head, slot, base, j, page)


def _copy_chunk(problem, gmem, smem, which, head, slot, base, j, page):
  """Copies the jth chunk of a tile, and its scales."""
  loaded, _ = _barriers(smem, which)
  # Rows that lie as they come, where TMA's tiles could not.
  plain: Any = dict(oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
  is_plain = problem.is_quantised and not fragments.transforms(problem.head_dim)
  page = jnp.clip(page, 0, problem.num_pages - 1)
  chunk, rows = problem.chunk, ()
  # The page as a whole is a simpler copy than all of its rows.
  if chunk < problem.page_size:
    row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
    rows = (pl.ds(row, chunk),)
  at, place = (page, head, *rows), (slot, pl.ds(j * chunk, chunk))
  plgpu.copy_gmem_to_smem(
    getattr(gmem, which).at[at],
    getattr(smem, f"{which}_smem").at[*place, pl.ds(0, problem.head_dim)],
    loaded.at[slot],
    **plain if is_plain else {},
  )
  if problem.is_quantised:
    plgpu.copy_gmem_to_smem(
      getattr(gmem, f"{which}_scales").at[at],
      getattr(smem, f"{which}_scales_smem").at[place],
      loaded.at[slot],
      **plain,
    )


def drain(problem: Problem, smem, num_tiles, share: Share) -> None:
  """Waits until all tiles were taken, of the rings that have a share.

  No barrier may be left with a completion that nobody waited for.
  """
  rings = [x for x, chunks in ((K, share.k), (V, share.v)) if chunks]

  @pl.loop(jnp.maximum(num_tiles - problem.config.num_stages, 0), num_tiles)
  def _(nth):
    for which in rings:
      _, consumed = _barriers(smem, which)
      plgpu.barrier_wait(consumed.at[_slot(problem, nth)])


def wait(problem: Problem, smem, which: str, nth):
  """Waits for the program's nth tile of K or V."""
  loaded, _ = _barriers(smem, which)
  plgpu.barrier_wait(loaded.at[_slot(problem, nth)])


def tile(problem: Problem, smem, which: str, nth):
  """Returns the program's nth tile of K or V."""
  return getattr(smem, f"{which}_smem").at[_slot(problem, nth)]


def scales(problem: Problem, smem, which: str, nth):
  """Returns the scales of the rows of a tile of 8-bit numbers."""
  return plgpu.load(
    getattr(smem, f"{which}_scales_smem").at[_slot(problem, nth)],
    layout=fragments.ROWS,
    optimized=False,
  )


def give_back(problem: Problem, smem, which: str, nth) -> None:
  """Lets the next tile take the place of one in the ring."""
  _, consumed = _barriers(smem, which)
  plgpu.barrier_arrive(consumed.at[_slot(problem, nth)])


def _slot(problem, nth):
  return lax.rem(nth, jnp.int32(problem.config.num_stages))


def _barriers(smem, which):
  return getattr(smem, f"{which}_loaded"), getattr(smem, f"{which}_consumed")
