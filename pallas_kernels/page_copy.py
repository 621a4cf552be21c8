"""Copies pages of a pool onto others, in place.

Program (copy, part) moves its part of one page through shared memory, tile by
tile: enough programs are on a multiprocessor to keep its copy engine busy. A
program whose copy does not exist ends at once, so that many places for copies
cost little: 256 places of pages of 1 MiB took 26 us in a loop of XLA that had
none to make, and 22 us more for each that it had (H200).
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_TILE_BYTES = 32_768
_MAX_ROWS = 256  # of a copy by TMA
_NUM_PARTS = 8  # of a page


def unsupported(page_shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
  """Returns why the kernel does not take pages of this shape, or None."""
  row = page_shape[-1]
  if row > _MAX_ROWS or row * jnp.dtype(dtype).itemsize % 16:
    return f"rows of {row} elements are not whole 16 bytes, up to {_MAX_ROWS}."
  return None


@functools.partial(jax.jit, static_argnames="interpret")
def copy_pages(
  pools: tuple[Float[Array, "num_pages ..."], ...],
  src: Int[Array, " num_copies"],
  dst: Int[Array, " num_copies"],
  *,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "num_pages ..."], ...]:
  """Returns the pools with pages copied; in place if they are donated.

  Args:
    pools: arrays of the same shape, at least 2-D, which all get the copies.
    src: pages to copy; clipped to the pool.
    dst: where to; no copy is made where it is not in [0, num_pages).
    interpret: parameters of the interpreter that stands in for a GPU.
  """
  if dst.shape[0] == 0:
    return pools
  num_pages, *page = pools[0].shape
  rows, columns = math.prod(page[:-1]), page[-1]
  most = min(_MAX_ROWS, _TILE_BYTES // (columns * pools[0].dtype.itemsize))
  tile = max(n for n in range(1, most + 1) if rows % n == 0)
  num_tiles = rows // tile
  num_parts = min(num_tiles, _NUM_PARTS)
  kernel = plgpu.kernel(
    functools.partial(_body, num_parts),
    out_type=(),
    scratch_types={
      "tile_smem": plgpu.SMEM((tile, columns), pools[0].dtype),
      "loaded": plgpu.Barrier(),
    },
    grid=(dst.shape[0], num_parts),
    grid_names=("copy", "part"),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
    kernel_name="copy_pages",
  )
  tiled = num_pages, num_tiles, tile, columns
  refs = [jax.new_ref(pool.reshape(tiled)) for pool in pools]
  kernel(src.astype(jnp.int32), dst.astype(jnp.int32), *refs)
  return tuple(ref[...].reshape(pools[0].shape) for ref in refs)


def _body(num_parts, src_gmem, dst_gmem, *pools, tile_smem, loaded):
  """Moves a part of a page, in every pool."""
  copy, part = lax.axis_index("copy"), lax.axis_index("part")
  src, dst = src_gmem[copy], dst_gmem[copy]
  num_pages, num_tiles = pools[0].shape[:2]
  src = jnp.clip(src, 0, num_pages - 1)
  first = lax.div(part * num_tiles, jnp.int32(num_parts))
  end = lax.div((part + 1) * num_tiles, jnp.int32(num_parts))

  @pl.when((dst >= 0) & (dst < num_pages))
  def _():
    @pl.loop(first, end)
    def _(i):
      for pool_gmem in pools:
        plgpu.copy_gmem_to_smem(pool_gmem.at[src, i], tile_smem, loaded)
        plgpu.barrier_wait(loaded)
        plgpu.copy_smem_to_gmem(tile_smem, pool_gmem.at[dst, i])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    plgpu.wait_smem_to_gmem(0)
