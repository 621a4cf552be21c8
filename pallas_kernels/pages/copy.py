"""Copies pages of a pool onto others, in place.

Program (copy, part) moves its part of one page through shared memory, tile by
tile: enough programs are on a multiprocessor to keep its copy engine busy. A
program whose copy does not exist ends at once, so that many places for copies
cost little. (With 256 places for pages of 1 MiB, a loop of XLA took 26 us to
copy nothing, and 22 us more for each copy, on an H200.)

A page is contiguous, and is copied as rows as wide as TMA takes, whatever its
shape: the small pages of scales are copied with those of the data.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Real

from pallas_kernels.common.rounding import cdiv
from pallas_kernels.pages.limits import (
  MAX_TMA_ROWS,
  unsupported_copy,
  widest_row,
)

_TILE_BYTES = 32_768
_NUM_PARTS = 8  # of a page


@functools.partial(jax.jit, static_argnames="interpret")
def copy_pages(
  pools: tuple[Real[Array, "num_pages ..."], ...],
  src: Int[Array, " num_copies"],
  dst: Int[Array, " num_copies"],
  *,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Real[Array, "num_pages ..."], ...]:
  """Returns the pools with pages copied; in place if they are donated.

  Args:
    pools: Arrays of equally many pages, of any shapes and dtypes that are not
      unsupported; all of them get the copies.
    src: Pages to copy; clipped to the pool.
    dst: Where to; no copy is made where it is not in [0, num_pages).
    interpret: Parameters of the interpreter that stands in for a GPU.

  Raises:
    NotImplementedError: If the kernel does not take the pages of an array.
  """
  if dst.shape[0] == 0:
    return pools
  page_bytes = max(pool.nbytes // pool.shape[0] for pool in pools)
  num_parts = min(cdiv(page_bytes, _TILE_BYTES), _NUM_PARTS)
  tiles = [_tile(pool.shape[1:], pool.dtype, num_parts) for pool in pools]
  kinds = [(tile, pool.dtype) for tile, pool in zip(tiles, pools, strict=True)]
  buffers = list(dict.fromkeys(kinds))  # alike pools share one
  kernel = plgpu.kernel(
    functools.partial(
      _body, num_parts, [buffers.index(kind) for kind in kinds]
    ),
    out_type=(),
    scratch_types={
      "tiles_smem": [plgpu.SMEM(tile, dtype) for tile, dtype in buffers],
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
  refs = [
    jax.new_ref(pool.reshape(pool.shape[0], -1, *tile))
    for pool, tile in zip(pools, tiles, strict=True)
  ]
  kernel(src.astype(jnp.int32), dst.astype(jnp.int32), *refs)
  return tuple(
    ref[...].reshape(pool.shape) for ref, pool in zip(refs, pools, strict=True)
  )


def _tile(
  page_shape: tuple[int, ...], dtype: DTypeLike, num_parts: int
) -> tuple[int, int]:
  """Returns rows and columns that are moved at once, the same in each tile."""
  num_elements = math.prod(page_shape)
  columns = widest_row(num_elements, dtype)
  if columns is None:
    raise NotImplementedError(unsupported_copy(page_shape, dtype))
  row_bytes = columns * jnp.dtype(dtype).itemsize
  rows = num_elements // columns
  tile_bytes = min(_TILE_BYTES, rows * row_bytes // num_parts)
  most = max(1, min(MAX_TMA_ROWS, tile_bytes // row_bytes))
  return max(n for n in range(1, most + 1) if rows % n == 0), columns


def _body(num_parts, buffers, src_gmem, dst_gmem, *pools, tiles_smem, loaded):
  """Moves a part of a page, in every pool."""
  copy, part = lax.axis_index("copy"), lax.axis_index("part")
  src, dst = src_gmem[copy], dst_gmem[copy]
  num_pages = pools[0].shape[0]
  src = jnp.clip(src, 0, num_pages - 1)

  def move(pool_gmem, tile_smem):
    num_tiles = pool_gmem.shape[1]
    first = lax.div(part * num_tiles, jnp.int32(num_parts))
    end = lax.div((part + 1) * num_tiles, jnp.int32(num_parts))

    @pl.loop(first, end)
    def _(i):
      plgpu.copy_gmem_to_smem(pool_gmem.at[src, i], tile_smem, loaded)
      plgpu.barrier_wait(loaded)
      plgpu.copy_smem_to_gmem(tile_smem, pool_gmem.at[dst, i])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when((dst >= 0) & (dst < num_pages))
  def _():
    for pool_gmem, buffer in zip(pools, buffers, strict=True):
      move(pool_gmem, tiles_smem[buffer])
    plgpu.wait_smem_to_gmem(0)
