"""Decode: converts 8-bit tiles to wgmma operands in registers.

wgmma takes its left operand from registers in tiles of 64 rows by 16 columns.
Warp w of the warpgroup holds rows 16 w to 16 w + 15. Of these, lane 4 g + c
holds rows g and g + 8, columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. An `ldmatrix`
loads an 8 by 8 matrix of 16-bit elements into a warp, two elements per lane.
Here an element is a pair of bytes, so lane 4 g + c gets:

  K                     row g:  bytes 4 c, 4 c + 1, 4 c + 2, 4 c + 3
  V^T, transposed       rows 2 c and 2 c + 1:  bytes 2 g and 2 g + 1 of each

Bytes 0 and 2 of these four become one register of two float16, bytes 1 and 3
another: one register for each half of 16 columns of K, or of 16 rows of V^T.
This permutes every 16 elements of head_dim, in K and V^T alike: element 2 g + h
goes to position 8 h + g. Q is permuted in the same way (`permute`,
`load_rows`), and the permutation of V^T P is undone (`store_rows`).

A tile in shared memory is row-major or swizzled by TMA: in rows of `swizzle`
bytes, the index of a 16-byte vector is XORed with the row. Then the 8 rows of
an `ldmatrix` lie in different banks.

float16 represents all values of int8 and float8_e4m3fn exactly.
"""

from typing import Any, NamedTuple

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.common.ptx import VECTOR_BYTES, advance
from pallas_kernels.common.swizzle import swizzle_bytes

ROWS = plgpu.Layout.WGMMA.reduce(1)  # layout of one value per row
# WGMMA's registers relabelled: undoes the permutation of the rows.
_PAIRS = mgpu.TiledLayout(
  fragmented_array.Tiling(((64, 8), (16, 8), (2, 8), (2,))),
  warp_dims=(-7,),
  lane_dims=(-5, -2),
  vector_dim=-1,
)
# `_PAIRS` with registers of one element.
_ELEMENTS = mgpu.TiledLayout(
  fragmented_array.Tiling(((64, 8), (16, 8), (2, 8), (2,), (1,))),
  warp_dims=(-8,),
  lane_dims=(-6, -3),
  vector_dim=-1,
)


class Load(NamedTuple):
  """One `ldmatrix` instruction of 2 or 4 matrices."""

  row: int  # offset from the row of `k_address`, `v_address`; a multiple of 8
  column: int  # offset from their column
  # For each matrix, the registers of its even and of its odd bytes in the
  # operand: (block of 64 rows, block of 8 columns, half of 16 rows).
  registers: list[tuple[tuple[int, int, int], tuple[int, int, int]]]


# PTX that converts 4 bytes, $2, to two float16 in $0 and two in $1.
# int8 x with its sign bit flipped is x + 128. With 0x64 as the high byte, it is
# the float16 1024 + 128 + x.
_FROM_INT8 = """{
  .reg .b32 flipped, even, odd, offset;
  xor.b32 flipped, $2, 0x80808080;
  prmt.b32 even, flipped, 0x64646464, 0x4240;
  prmt.b32 odd, flipped, 0x64646464, 0x4341;
  mov.b32 offset, 0x64806480;
  sub.f16x2 $0, even, offset;
  sub.f16x2 $1, odd, offset;
}"""
_FROM_FLOAT8 = """{
  .reg .b32 sorted;
  .reg .b16 even, odd;
  prmt.b32 sorted, $2, 0, 0x3120;
  mov.b32 {even, odd}, sorted;
  cvt.rn.f16x2.e4m3x2 $0, even;
  cvt.rn.f16x2.e4m3x2 $1, odd;
}"""


def transforms(head_dim: int) -> tuple[Any, ...]:
  """Returns the layout of 8-bit tiles in shared memory; () means row-major."""
  swizzle = swizzle_bytes(head_dim)
  if swizzle is None:
    return ()
  return (
    plgpu.TilingTransform((8, swizzle)),
    plgpu.SwizzleTransform(swizzle),
  )


def permute(q):
  """Returns q with its last axis, head_dim, permuted."""
  *shape, head_dim = q.shape
  q = q.reshape(*shape, head_dim // 16, 8, 2)
  return q.swapaxes(-1, -2).reshape(*shape, head_dim)


def load_rows(ref):
  """Loads [head_dim, columns], and permutes its rows.

  Args:
    ref: 16-bit elements in shared memory.

  Returns:
    The array in layout WGMMA.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(
      ref.shape, ref.dtype, plgpu.Layout.WGMMA
    ),
  )
  def load(_, source):
    array = mgpu.FragmentedArray.load_untiled(
      source, layout=_ELEMENTS, optimized=False
    )
    array = _relabel(array, fragmented_array.WGMMA_LAYOUT_ACC_32BIT)
    return array.to_layout(fragmented_array.WGMMA_LAYOUT)

  return load(ref)


def store_rows(ref, array) -> None:
  """Stores [head_dim, columns] whose rows are permuted.

  Args:
    ref: Receives the rows in natural order.
    array: In layout WGMMA.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
  def store(_, target, array):
    utils.warpgroup_barrier()  # other warps may still read `target`
    _relabel(array, _PAIRS).store_untiled(target, optimized=False)
    utils.warpgroup_barrier()  # makes the rows visible to other warps

  store(ref, array)


def _relabel(array, layout):
  """Returns the same registers, interpreted in another layout."""
  shape = layout.registers_shape(array.shape)
  return mgpu.FragmentedArray(
    _registers=array.registers.reshape(shape),
    _layout=layout,
    _is_signed=array.is_signed,
  )


def load_k(tile_smem, start: int, size: int, *, interpreted: bool):
  """Loads columns of a tile of K as the left operand of wgmma.

  Args:
    tile_smem: int8 or float8_e4m3fn [keys, head_dim], laid out by `transforms`.
    start: First column, a multiple of 32.
    size: Number of columns, a multiple of 16.
    interpreted: Whether the interpreter runs the kernel. Then the columns stay
      in natural order.

  Returns:
    float16 [keys, size].
  """
  if interpreted:
    return _widen(tile_smem)[:, start : start + size]
  keys = tile_smem.shape[0]
  return _load(tile_smem, (keys, size), k_address, k_loads(keys, start, size))


def load_v(tile_smem, start: int, size: int, *, interpreted: bool):
  """Loads rows of V^T as the left operand of wgmma.

  Args:
    tile_smem: int8 or float8_e4m3fn [keys, head_dim], laid out by `transforms`.
    start: First row of V^T, an index into head_dim.
    size: Number of rows, a multiple of 64.
    interpreted: See `load_k`.

  Returns:
    float16 [size, keys].
  """
  if interpreted:
    return _widen(tile_smem)[:, start : start + size].T
  keys = tile_smem.shape[0]
  loads = v_loads(keys, start, size)
  return _load(tile_smem, (size, keys), v_address, loads, is_transposed=True)


def zero_rows(tile_smem, keep, *, interpreted: bool) -> None:
  """Zeroes rows of an 8-bit tile in shared memory.

  Args:
    tile_smem: See `load_k`.
    keep: bool [keys], in layout `ROWS`; rows with False are zeroed.
    interpreted: See `load_k`.
  """
  if interpreted:
    rows = tile_smem[...]
    tile_smem[...] = jnp.where(keep[:, None], rows, jnp.zeros_like(rows))
    return
  head_dim = tile_smem.shape[1]

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms(head_dim)), ROWS))
  def zero(_, tile, keep):
    thread, i32 = _thread(), ir.IntegerType.get_signless(32)
    zeros = llvm.mlir_zero(ir.VectorType.get((4,), i32))
    for nth, kept in enumerate(keep.registers.flat):
      row = 16 * (thread // 32) + thread // 4 % 8 + 8 * nth + 48 * (nth // 2)
      kept = vector.extract(kept, [], [0])
      is_masked = arith.cmpi(arith.CmpIPredicate.eq, kept, utils.c(0, i32))
      with utils.when(is_masked):
        for column in range(0, head_dim, 4 * VECTOR_BYTES):
          # Four threads share a row.
          start = (column + VECTOR_BYTES * (thread % 4)) % head_dim
          llvm.store(zeros, _pointer(tile, row, start, head_dim))

  zero(tile_smem, keep.astype(jnp.int32))


def k_address(thread):
  """Returns the row and column that a thread addresses in an `ldmatrix` of K.

  Args:
    thread: Index of the thread in the warpgroup.
  """
  warp, matrix, row = thread // 32, thread // 8 % 4, thread % 8
  return 16 * warp + 8 * (matrix % 2) + row, VECTOR_BYTES * (matrix // 2)


def v_address(thread):
  """Returns the row and column that a thread addresses in an `ldmatrix` of V.

  Args:
    thread: Index of the thread in the warpgroup.
  """
  return thread % 32, VECTOR_BYTES * (thread // 32)


def k_loads(keys: int, start: int, size: int) -> list[Load]:
  """Returns the `ldmatrix` instructions of `load_k`; see there for Args."""
  loads = []
  for row in range(0, keys, 64):
    for column in range(0, size, 32):
      registers = []
      for k_step in range(column // 16, min(column + 32, size) // 16):
        for half in range(2):
          even, odd = ((row // 64, 2 * k_step + i, half) for i in range(2))
          registers.append((even, odd))
      loads.append(Load(row, start + column, registers))
  return loads


def v_loads(keys: int, start: int, size: int) -> list[Load]:
  """Returns the `ldmatrix` instructions of `load_v`; see there for Args."""
  loads = []
  for block in range(size // 64):
    for key in range(0, keys, 32):
      eights = range(key // 8, key // 8 + 4)
      registers = [((block, i, 0), (block, i, 1)) for i in eights]
      loads.append(Load(key, start + 64 * block, registers))
  return loads


def byte_offset(row, column, head_dim: int):
  """Returns the offset of a byte of a tile from the beginning of the tile.

  Args:
    row: Row in the tile.
    column: Byte in the row.
    head_dim: Bytes per row.
  """
  swizzle = swizzle_bytes(head_dim)
  if swizzle is None:
    return row * head_dim + column
  tile = row // 8 * (head_dim // swizzle) + column // swizzle
  offset = (tile * 8 + row % 8) * swizzle + column % swizzle
  # XOR bits 4 and up, the 16-byte vector, with bits 7 and up, the index of the
  # 128 bytes: the row, if the swizzle is 128 bytes.
  return offset ^ (offset // 8 & swizzle - VECTOR_BYTES)


def _widen(tile_smem):
  """Widens a tile to float16, in the interpreter."""
  return tile_smem[...].astype(jnp.float32).astype(jnp.float16)


def _load(tile_smem, shape, first_address, loads, *, is_transposed=False):
  """Loads a tile as a float16 operand in layout WGMMA.

  Args:
    tile_smem: See `load_k`.
    shape: Shape of the operand.
    first_address: `k_address` or `v_address`.
    loads: The `ldmatrix` instructions.
    is_transposed: Whether `ldmatrix` transposes its matrices.
  """
  head_dim = tile_smem.shape[1]
  is_int = tile_smem.dtype == jnp.int8

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms(head_dim)),),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float16, plgpu.Layout.WGMMA),
  )
  def read(_, tile):
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    by_block = registers.reshape(shape[0] // 64, shape[1] // 8, 2)
    pairs = ir.VectorType.get((2,), ir.F16Type.get())
    row, column = first_address(_thread())
    for load in loads:
      pointer = _pointer(tile, row, column + load.column, head_dim)
      # A multiple of 8 rows further on, the swizzle is the same: add an offset.
      pointer = advance(pointer, load.row * head_dim)
      words = _ldmatrix(pointer, len(load.registers), is_transposed)
      for word, blocks in zip(words, load.registers, strict=True):
        for at, register in zip(blocks, _widen_word(word, is_int), strict=True):
          by_block[at] = utils.bitcast(register, pairs)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout, _is_signed=None
    )

  return read(tile_smem)


def _thread():
  """Returns the index of the thread in its warpgroup."""
  thread = mgpu.FragmentedArray.splat(utils.thread_idx(), (), is_signed=False)
  return thread % 128


def _pointer(tile, row, column, head_dim):
  """Returns a pointer to a byte of a tile; see `byte_offset`."""
  offset = byte_offset(row, column, head_dim).registers.item()
  return advance(utils.memref_ptr(tile), offset)


def _ldmatrix(pointer, num, is_transposed):
  """Loads 2 or 4 matrices of 8 rows by 16 bytes; returns a word of each."""
  words: Any = nvvm.ldmatrix(
    pointer,
    layout=nvvm.MMALayout.col if is_transposed else nvvm.MMALayout.row,
    num=num,
    shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
    elt_type=nvvm.LdStMatrixEltType.B16,
  )
  i32 = ir.IntegerType.get_signless(32)
  return [llvm.extractvalue(i32, words, [i]) for i in range(num)]


def _widen_word(word, is_int):
  """Widens four 8-bit elements to two registers of two float16 each."""
  i32 = ir.IntegerType.get_signless(32)
  pair: Any = llvm.inline_asm(
    llvm.StructType.get_literal([i32, i32]),
    [word],
    _FROM_INT8 if is_int else _FROM_FLOAT8,
    "=r,=r,r",
  )
  return [llvm.extractvalue(i32, pair, [i]) for i in range(2)]
