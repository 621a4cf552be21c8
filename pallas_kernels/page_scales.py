"""Scales of the tokens of a tile, gathered by a warpgroup from their pages.

To copy the scales of a chunk, 32 bytes or little more, would cost a warpgroup
as much as to copy its numbers: it meets, and all of its threads arrive at the
barrier. So each thread loads the scale of a token while it waits for the ring,
and stores it before it arrives with the copies of the numbers.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_THREADS = 128  # of a warpgroup
_SCALAR = plgpu.Layout.WG_SPLAT(())
_BY_THREAD = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)


def chunk_number(page, head, row, shape: tuple[int, int, int], chunk: int):
  """Returns the number of a chunk, if all chunks of an array are counted.

  Args:
    page: where it is.
    head: its KV head.
    row: its first row in the page.
    shape: of the array: num_pages, num_kv_heads, page_size.
    chunk: rows of a chunk, a power of two that divides page_size.
  """
  _, num_kv_heads, page_size = shape
  in_page = row >> chunk.bit_length() - 1
  return (page * num_kv_heads + head) * (page_size // chunk) + in_page


def load(scales_gmem, chunks, chunk: int):
  """Returns the scales of a tile: f32[128], from the first row on, and again.

  Args:
    scales_gmem: f32[num_pages, num_kv_heads, page_size].
    chunks: those of the tile, by `chunk_number`.
    chunk: rows of a chunk.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), [_SCALAR for _ in chunks]),
    return_type=plgpu.ShapeDtypeStruct((_THREADS,), jnp.float32, _BY_THREAD),
  )
  def gather(_, scales, chunks):
    row = _thread() % (len(chunks) * chunk)
    nth, ahead = (x.registers.item() for x in (row // chunk, row % chunk))
    first, *others = (x.registers.item() for x in chunks)
    for i, other in enumerate(others, 1):
      is_other = arith.cmpi(arith.CmpIPredicate.eq, nth, _i32(i))
      first = arith.select(is_other, other, first)
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    first = arith.muli(arith.extsi(i64, first), utils.c(chunk, i64))
    at = arith.addi(first, arith.extui(i64, ahead))
    pointer = utils.getelementptr(utils.memref_ptr(scales), [at], f32)
    value = llvm.load(ir.VectorType.get((1,), f32), pointer, alignment=4)
    return mgpu.FragmentedArray(
      _registers=np.array([value], dtype=object),
      _layout=_BY_THREAD.to_mgpu(),
      _is_signed=None,
    )

  return gather(scales_gmem, list(chunks))


def store(scales_smem, values) -> None:
  """Stores what `load` returned, of which the rows of the tile are taken."""
  num_rows = scales_smem.shape[0]

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _BY_THREAD))
  def put(_, scales, values):
    row = (_thread() % num_rows).registers.item()
    target = utils.getelementptr(
      utils.memref_ptr(scales), [row], ir.F32Type.get()
    )
    llvm.store(values.registers.item(), target, alignment=4)

  put(scales_smem, values)


def _thread():
  """Returns the number of a thread, of the warpgroup."""
  thread = mgpu.FragmentedArray.splat(utils.thread_idx(), (), is_signed=False)
  return thread % _THREADS


def _i32(value: int):
  return utils.c(value, ir.IntegerType.get_signless(32))
