"""8-bit numbers into 16-bit operands of wgmma, through registers.

The layouts of Mosaic would move four bytes at a time, and keep many addresses
in registers. Here a thread takes 16 bytes, which become two pieces of 16, and
writes them where wgmma looks for them in a swizzled tile:

  rows      16 bytes of a row: t0  t1  t2  t3 ...      as copied, row by row
  operand   tiles of 8 rows of `swizzle` bytes; in a tile, the place of a piece
            in its row is XORed with the number of the row

float32 holds a number times the scale of its row; it is rounded once.
"""

import itertools
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_THREADS = 128  # of a warpgroup
_PIECE = 16  # bytes that a thread moves at once

# 4 numbers in a register, $2, times $3, become 2 in each of $0 and $1, rounded
# to KIND. 0x4B makes the float32 2^23 + 128 + x of an int8 whose first bit is
# flipped.
_SCALED_INT8 = """{
  .reg .b32 flipped;
  .reg .f32 x<4>;
  xor.b32 flipped, $2, 0x80808080;
  prmt.b32 x0, flipped, 0x4B000000, 0x7440;
  prmt.b32 x1, flipped, 0x4B000000, 0x7441;
  prmt.b32 x2, flipped, 0x4B000000, 0x7442;
  prmt.b32 x3, flipped, 0x4B000000, 0x7443;
  sub.rn.f32 x0, x0, 0f4B000080;
  sub.rn.f32 x1, x1, 0f4B000080;
  sub.rn.f32 x2, x2, 0f4B000080;
  sub.rn.f32 x3, x3, 0f4B000080;"""
_SCALED_FLOAT8 = """{
  .reg .b16 low, high, h<4>;
  .reg .b32 halves<2>;
  .reg .f32 x<4>;
  mov.b32 {low, high}, $2;
  cvt.rn.f16x2.e4m3x2 halves0, low;
  cvt.rn.f16x2.e4m3x2 halves1, high;
  mov.b32 {h0, h1}, halves0;
  mov.b32 {h2, h3}, halves1;
  cvt.f32.f16 x0, h0;
  cvt.f32.f16 x1, h1;
  cvt.f32.f16 x2, h2;
  cvt.f32.f16 x3, h3;"""
_SCALED = """
  mul.rn.f32 x0, x0, $3;
  mul.rn.f32 x1, x1, $3;
  mul.rn.f32 x2, x2, $3;
  mul.rn.f32 x3, x3, $3;
  cvt.rn.KINDx2.f32 $0, x1, x0;
  cvt.rn.KINDx2.f32 $1, x3, x2;
}"""


def scaled(
  tile_smem,
  scales_smem,
  operand_smem,
  transforms,
  *,
  first_row: int,
  ahead: int,
  interpreted: bool,
):
  """Writes the numbers of rows, times their scales, to an operand.

  Args:
    tile_smem: int8 or float8_e4m3fn [rows, columns], row by row.
    scales_smem: float32 [rows]; at most `largest_scale` counts.
    operand_smem: bfloat16 or float16 [some rows, columns].
    transforms: of the operand: tiles of 8 rows, swizzled.
    first_row: the row of the operand that is the first to be written.
    ahead: pieces that are on their way to a thread.
    interpreted: whether an interpreter runs it.
  """
  shape, swizzle = tile_smem.shape, transforms[1].swizzle
  dtype, is_int = operand_smem.dtype, tile_smem.dtype == jnp.int8
  limit = largest_scale(dtype, tile_smem.dtype)
  if interpreted:
    scales = jnp.minimum(scales_smem[...], jnp.float32(limit))
    rows = tile_smem[...].astype(jnp.float32) * scales[:, None]
    operand_smem[pl.ds(first_row, shape[0])] = rows.astype(dtype)
    return
  kind = "bf16" if dtype == jnp.bfloat16 else "f16"
  convert = _SCALED_INT8 if is_int else _SCALED_FLOAT8
  convert += _SCALED.replace("KIND", kind)

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.RefType(tuple(transforms)),
    )
  )
  def widen(_, tile, scales, operand):
    load_scale = lambda row, first: _load_scale(scales, row, first, limit)
    rows = dict(first_row=first_row, ahead=ahead)
    _move(tile, operand, shape, swizzle, convert, load_scale, **rows)

  widen(tile_smem, scales_smem, operand_smem)


def largest_scale(dtype: DTypeLike, kv_dtype: DTypeLike) -> float:
  """Returns the scale that takes the greatest 8-bit number to that of dtype."""
  greatest = 128.0 if jnp.dtype(kv_dtype) == jnp.int8 else 448.0
  return float(jnp.finfo(dtype).max) / greatest


def _move(
  tile, operand, shape, swizzle, convert, load_scale, *, first_row, ahead
):
  """Moves all rows of a tile, `ahead` pieces of a thread at a time."""
  rows, columns = shape
  first, source, targets = _first_places(rows, columns, swizzle)
  source = _at(utils.memref_ptr(tile), source)
  targets = [_at(utils.memref_ptr(operand), place) for place in targets]
  starts = range(0, rows, _rows_at_once(rows, columns))
  for group in itertools.batched(starts, ahead):
    # Rows that are a multiple of 8 ahead lie as far ahead, XORed alike.
    numbers = [_load(_at(source, _i32(row * columns))) for row in group]
    factors = [load_scale(row, first) for row in group]
    for row, x, factor in zip(group, numbers, factors, strict=True):
      offset = _i32((first_row + row) * columns * 2)
      places = [_at(target, offset) for target in targets]
      _store(x, places, convert, factor)


def _rows_at_once(rows, columns):
  """Returns how many rows a warpgroup moves at once: a power of two, from 8."""
  most = 1 << ((_THREADS // (columns // _PIECE)).bit_length() - 1)
  return min(most, rows)


def _first_places(rows, columns, swizzle):
  """Returns a thread's first row, and where it reads and writes a piece of it.

  Threads past the last piece do what others do.
  """
  per_row = columns // _PIECE
  piece = arith.remui(
    utils.thread_idx(), _i32(_rows_at_once(rows, columns) * per_row)
  )
  row, column = (
    arith.divui(piece, _i32(per_row)),
    arith.remui(piece, _i32(per_row)),
  )
  byte = arith.muli(column, _i32(2 * _PIECE))
  tile = arith.divui(byte, _i32(swizzle))
  # Neighbours write even places of a tile, those in the next tile odd ones:
  # that of another row. No two of eight threads meet in a bank.
  row = arith.xori(row, arith.andi(tile, _i32(1)))
  source = arith.addi(
    arith.muli(row, _i32(columns)), arith.muli(column, _i32(_PIECE))
  )
  start = _start_of_row(row, tile, 2 * columns, swizzle)
  targets = []
  for i in range(2):
    place = arith.addi(byte, _i32(i * _PIECE))
    place = arith.addi(start, arith.remui(place, _i32(swizzle)))
    # Bits 4 and on, the place in the row, by bits 7 and on: the row, if it has
    # 128 bytes.
    row_bits = arith.andi(arith.shrui(place, _i32(3)), _i32(swizzle - _PIECE))
    targets.append(arith.xori(place, row_bits))
  return row, source, targets


def _start_of_row(row, tile, row_bytes, swizzle):
  """Returns where a row of a tile begins: tiles lie row after row."""
  tiles = arith.muli(arith.divui(row, _i32(8)), _i32(row_bytes // swizzle))
  rows = arith.muli(arith.addi(tiles, tile), _i32(8))
  rows = arith.addi(rows, arith.remui(row, _i32(8)))
  return arith.muli(rows, _i32(swizzle))


def _words():
  return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def _load(source):
  """Returns 16 numbers."""
  return llvm.load(_words(), source, alignment=_PIECE)


def _load_scale(scales, row, first, limit):
  """Returns the scale of a row from the first on, at most the limit, or NaN."""
  place = _at(utils.memref_ptr(scales), arith.muli(first, _i32(4)))
  scale: Any = llvm.load(
    ir.F32Type.get(), _at(place, _i32(4 * row)), alignment=4
  )
  return arith.minimumf(scale, mgpu.c(limit, ir.F32Type.get()))


def _store(numbers, targets, convert, factor):
  """Writes 16 numbers to two places."""
  elements = (llvm.extractelement(numbers, _i32(i)) for i in range(4))
  wide = [half for x in elements for half in _convert(convert, x, factor)]
  for i, target in enumerate(targets):
    vector = llvm.mlir_undef(_words())
    for j in range(4):
      vector = llvm.insertelement(vector, wide[4 * i + j], _i32(j))
    llvm.store(vector, target, alignment=_PIECE)


def _convert(convert, word, factor):
  """Returns two registers of 16-bit numbers for one of 8-bit numbers."""
  i32 = ir.IntegerType.get_signless(32)
  pair: Any = llvm.inline_asm(
    llvm.StructType.get_literal([i32, i32]),
    [word, factor],
    convert,
    "=r,=r,r,f",
  )
  return [llvm.extractvalue(i32, pair, [i]) for i in range(2)]


def _at(pointer, offset):
  return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _i32(value: int) -> Any:
  return mgpu.c(value, ir.IntegerType.get_signless(32))
