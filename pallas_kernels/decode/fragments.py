"""8-bit numbers from shared memory into registers, as left operands of wgmma.

wgmma takes a left operand from registers, in tiles of 64 rows by 16 columns:
warp w of the warpgroup has rows 16 w to 16 w + 15; of these, lane 4 g + c has
rows g and g + 8, and of each the columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. An
`ldmatrix` brings 8 rows of 16 bytes of shared memory to a warp, 4 bytes to a
lane, as if they were 8 by 8 pairs of bytes:

  K                     row g:  bytes 4 c, 4 c + 1, 4 c + 2, 4 c + 3
  V^T, transposed       rows 2 c and 2 c + 1:  bytes 2 g and 2 g + 1 of each

Of such four bytes, the first and the third become a register of float16, the
second and the fourth another, one for each half of 16 columns of K or of 16
rows of V^T. So these come in another order, which is the same for both, in
every 16 of `head_dim`: element 2 g + h is in place 8 h + g. Q is put into this
order (`to_order`, `load_rows`), and V^T P out of it (`store_rows`).

Tiles lie row by row, or as TMA swizzles them: in rows of `swizzle` bytes, the
number of 16 bytes XORed with that of the row. The 8 rows of an `ldmatrix` are
in different banks then.

float16 holds all values of int8 and of float8_e4m3fn exactly.
"""

from typing import Any, NamedTuple

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

_SWIZZLES = (128, 64, 32)  # bytes
_PIECE = 16  # bytes of a row that an `ldmatrix` takes
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a value for each row
# Rows in natural order, in registers where WGMMA has those of the other order.
_PAIRS = mgpu.TiledLayout(
  fragmented_array.Tiling(((64, 8), (16, 8), (2, 8), (2,))),
  warp_dims=(-7,),
  lane_dims=(-5, -2),
  vector_dim=-1,
)
# The same, one element at a time.
_ELEMENTS = mgpu.TiledLayout(
  fragmented_array.Tiling(((64, 8), (16, 8), (2, 8), (2,), (1,))),
  warp_dims=(-8,),
  lane_dims=(-6, -3),
  vector_dim=-1,
)


class Load(NamedTuple):
  """An `ldmatrix` of some matrices."""

  row: int  # ahead of where the threads point, a multiple of 8
  column: int  # the same
  # For each matrix, where in the operand the registers of its even and of its
  # odd bytes are: block of 64 rows, of 8 columns, half of 16 rows.
  registers: list[tuple[tuple[int, int, int], tuple[int, int, int]]]


# 4 numbers in a register, $2, become 2 in each of $0 and $1.
# Of an int8 whose first bit is flipped, 0x64 makes the float16 1152 + x.
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
  """Returns how 8-bit rows lie in shared memory; row by row if by none."""
  swizzle = _swizzle(head_dim)
  if swizzle is None:
    return ()
  return (
    plgpu.TilingTransform((8, swizzle)),
    plgpu.SwizzleTransform(swizzle),
  )


def to_order(q):
  """Returns q with its last axis in the order of the registers."""
  *shape, head_dim = q.shape
  q = q.reshape(*shape, head_dim // 16, 8, 2)
  return q.swapaxes(-1, -2).reshape(*shape, head_dim)


def load_rows(ref):
  """Returns [head_dim, columns], its rows in the order of the registers."""

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
  """Stores [head_dim, columns], whose rows are in the order of the registers.

  Args:
    ref: gets them in natural order.
    array: of the layout WGMMA.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
  def store(_, target, array):
    utils.warpgroup_barrier()  # others may still read
    _relabel(array, _PAIRS).store_untiled(target, optimized=False)
    utils.warpgroup_barrier()  # for others to see it

  store(ref, array)


def _relabel(array, layout):
  """Returns an array of the same registers in another layout."""
  shape = layout.registers_shape(array.shape)
  return mgpu.FragmentedArray(
    _registers=array.registers.reshape(shape),
    _layout=layout,
    _is_signed=array.is_signed,
  )


def load_k(tile_smem, start: int, size: int, *, interpreted: bool):
  """Returns columns of a tile of K as a left operand.

  Args:
    tile_smem: int8 or float8_e4m3fn [keys, head_dim], as `transforms` says.
    start: of the columns, in head_dim; a multiple of 32.
    size: of the columns, a multiple of 16.
    interpreted: whether an interpreter runs it; head_dim is in natural order
      then.

  Returns:
    float16 [keys, size].
  """
  if interpreted:
    return _widen(tile_smem)[:, start : start + size]
  keys = tile_smem.shape[0]
  return _load(tile_smem, (keys, size), k_place, k_loads(keys, start, size))


def load_v(tile_smem, start: int, size: int, *, interpreted: bool):
  """Returns rows of V^T as a left operand.

  Args:
    tile_smem: int8 or float8_e4m3fn [keys, head_dim], as `transforms` says.
    start: of the rows, in head_dim.
    size: of the rows.
    interpreted: see `load_k`.

  Returns:
    float16 [size, keys].
  """
  if interpreted:
    return _widen(tile_smem)[:, start : start + size].T
  keys = tile_smem.shape[0]
  loads = v_loads(keys, start, size)
  return _load(tile_smem, (size, keys), v_place, loads, is_transposed=True)


def zero_rows(tile_smem, keep, *, interpreted: bool) -> None:
  """Zeroes rows of a tile.

  Args:
    tile_smem: see `load_k`.
    keep: bool [keys], of the layout `ROWS`: which rows to leave as they are.
    interpreted: see `load_k`.
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
      is_lost = arith.cmpi(arith.CmpIPredicate.eq, kept, utils.c(0, i32))
      with utils.when(is_lost):
        for column in range(0, head_dim, 4 * _PIECE):
          # Four threads share a row.
          piece = (column + _PIECE * (thread % 4)) % head_dim
          llvm.store(zeros, _pointer(tile, row, piece, head_dim))

  zero(tile_smem, keep.astype(jnp.int32))


def k_place(thread):
  """Returns row and column that a thread gives to an `ldmatrix` of K.

  Args:
    thread: of the warpgroup.
  """
  warp, matrix, row = thread // 32, thread // 8 % 4, thread % 8
  return 16 * warp + 8 * (matrix % 2) + row, _PIECE * (matrix // 2)


def v_place(thread):
  """Returns row and column that a thread gives to an `ldmatrix` of V."""
  return thread % 32, _PIECE * (thread // 32)


def k_loads(keys: int, start: int, size: int) -> list[Load]:
  """Returns the loads of columns of K; see `load_k`."""
  loads = []
  for row in range(0, keys, 64):
    for column in range(0, size, 32):
      registers = []
      for piece in range(column // 16, min(column + 32, size) // 16):
        for half in range(2):
          even, odd = ((row // 64, 2 * piece + i, half) for i in range(2))
          registers.append((even, odd))
      loads.append(Load(row, start + column, registers))
  return loads


def v_loads(keys: int, start: int, size: int) -> list[Load]:
  """Returns the loads of rows of V^T; see `load_v`."""
  loads = []
  for block in range(size // 64):
    for key in range(0, keys, 32):
      eights = range(key // 8, key // 8 + 4)
      registers = [((block, i, 0), (block, i, 1)) for i in eights]
      loads.append(Load(key, start + 64 * block, registers))
  return loads


def address(row, column, head_dim: int):
  """Returns where a byte of a tile lies: bytes from its beginning."""
  swizzle = _swizzle(head_dim)
  if swizzle is None:
    return row * head_dim + column
  tile = row // 8 * (head_dim // swizzle) + column // swizzle
  place = (tile * 8 + row % 8) * swizzle + column % swizzle
  # Bits 4 and on, the piece of the row, by bits 7 and on: the row, if it has
  # 128 bytes.
  return place ^ (place // 8 & swizzle - _PIECE)


def _swizzle(head_dim):
  return next((x for x in _SWIZZLES if head_dim % x == 0), None)


def _widen(tile_smem):
  """Returns the numbers of a tile where there is no GPU."""
  return tile_smem[...].astype(jnp.float32).astype(jnp.float16)


def _load(tile_smem, shape, first_place, loads, *, is_transposed=False):
  """Returns an operand of a shape.

  Args:
    tile_smem: see `load_k`.
    shape: of the operand.
    first_place: `k_place` or `v_place`.
    loads: what to load.
    is_transposed: whether a lane gets two bytes of two rows.
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
    by_place = registers.reshape(shape[0] // 64, shape[1] // 8, 2)
    pairs = ir.VectorType.get((2,), ir.F16Type.get())
    row, column = first_place(_thread())
    for load in loads:
      pointer = _pointer(tile, row, column + load.column, head_dim)
      # Rows that are a multiple of 8 ahead lie as far ahead, XORed alike.
      pointer = _ahead(pointer, load.row * head_dim)
      words = _ldmatrix(pointer, len(load.registers), is_transposed)
      for word, places in zip(words, load.registers, strict=True):
        for at, register in zip(places, _convert(word, is_int), strict=True):
          by_place[at] = utils.bitcast(register, pairs)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout, _is_signed=None
    )

  return read(tile_smem)


def _thread():
  """Returns the number of a thread, of the warpgroup."""
  thread = mgpu.FragmentedArray.splat(utils.thread_idx(), (), is_signed=False)
  return thread % 128


def _pointer(tile, row, column, head_dim):
  """Returns a pointer to a byte of a tile."""
  at = address(row, column, head_dim).registers.item()
  return _ahead(utils.memref_ptr(tile), at)


def _ahead(pointer, num_bytes):
  i8 = ir.IntegerType.get_signless(8)
  return utils.getelementptr(pointer, [num_bytes], i8)


def _ldmatrix(pointer, num, is_transposed):
  """Returns a word of each of 2 or 4 matrices of 8 rows of 16 bytes."""
  words: Any = nvvm.ldmatrix(
    pointer,
    layout=nvvm.MMALayout.col if is_transposed else nvvm.MMALayout.row,
    num=num,
    shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
    elt_type=nvvm.LdStMatrixEltType.B16,
  )
  i32 = ir.IntegerType.get_signless(32)
  return [llvm.extractvalue(i32, words, [i]) for i in range(num)]


def _convert(word, is_int):
  """Returns two registers of float16 for one of 8-bit numbers."""
  i32 = ir.IntegerType.get_signless(32)
  pair: Any = llvm.inline_asm(
    llvm.StructType.get_literal([i32, i32]),
    [word],
    _FROM_INT8 if is_int else _FROM_FLOAT8,
    "=r,=r,r",
  )
  return [llvm.extractvalue(i32, pair, [i]) for i in range(2)]
