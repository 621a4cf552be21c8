"""Copies pages of the pool onto other pages, in place.

Program (copy, part) copies one part of one page through shared memory, tile by
tile. Each multiprocessor runs enough programs to keep its copy engine busy.
Entries of the copy list may be empty: a program without a copy ends at once, so
a long list costs little. (With 256 entries and pages of 1 MiB, an XLA loop took
26 us without a copy and 22 us more per copy, on an H200.)

A page is contiguous. It is copied as rows as wide as TMA allows, whatever its
shape, so that one kernel copies K, V and the small pages of scales.
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

_TILE_BYTES = 32_768  # shared memory per tile, at most
_NUM_PARTS = 8  # programs per page, at most


@functools.partial(jax.jit, static_argnames="interpret")
def copy_pages(
  pools: tuple[Real[Array, "num_pages ..."], ...],
  src: Int[Array, " num_copies"],
  dst: Int[Array, " num_copies"],
  *,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Real[Array, "num_pages ..."], ...]:
  """Copies page src[i] to page dst[i] in each pool.

  Args:
    pools: Arrays with the same number of pages; see `limits.unsupported_copy`.
      In place if the caller donates them.
    src: Source pages; clipped to the pool.
    dst: Destination pages; entries outside [0, num_pages) copy nothing. The
      others must differ, and must not be sources of copies.
    interpret: Parameters of the Pallas interpreter; None compiles for a GPU.

  Returns:
    The pools with pages copied.

  Raises:
    NotImplementedError: If the kernel does not support the pages of a pool.
  """
  if dst.shape[0] == 0:
    return pools
  page_bytes = max(pool.nbytes // pool.shape[0] for pool in pools)
  num_parts = min(cdiv(page_bytes, _TILE_BYTES), _NUM_PARTS)
  tiles = [_tile(pool.shape[1:], pool.dtype, num_parts) for pool in pools]
  kinds = [(tile, pool.dtype) for tile, pool in zip(tiles, pools, strict=True)]
  buffers = list(dict.fromkeys(kinds))  # one per tile shape and dtype
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
  """Returns the rows and columns of a tile; tiles divide the page evenly."""
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
  """The program: copies a part of a page, in each pool."""
  # 1. Read the copy that the program belongs to.
  copy, part = lax.axis_index("copy"), lax.axis_index("part")
  src, dst = src_gmem[copy], dst_gmem[copy]
  num_pages = pools[0].shape[0]
  src = jnp.clip(src, 0, num_pages - 1)

  # 2. Copy the tiles of the part one by one. One buffer is enough: while this
  # program waits, others on the multiprocessor copy.
  def copy_part(pool_gmem, tile_smem):
    num_tiles = pool_gmem.shape[1]
    first = lax.div(part * num_tiles, jnp.int32(num_parts))
    end = lax.div((part + 1) * num_tiles, jnp.int32(num_parts))

    @pl.loop(first, end)
    def _(i):
      plgpu.copy_gmem_to_smem(pool_gmem.at[src, i], tile_smem, loaded)
      plgpu.barrier_wait(loaded)
      plgpu.copy_smem_to_gmem(tile_smem, pool_gmem.at[dst, i])
      # The next load overwrites the tile: wait until this store has read it.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  # 3. Without a copy, end at once.
  @pl.when((dst >= 0) & (dst < num_pages))
  def _():
    for pool_gmem, buffer in zip(pools, buffers, strict=True):
      copy_part(pool_gmem, tiles_smem[buffer])
    plgpu.wait_smem_to_gmem(0)
