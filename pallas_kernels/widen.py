"""8-bit numbers into float16 operands of wgmma, through registers.

The layouts of Mosaic would move four bytes at a time, and keep so many
addresses in registers that one program instead of two has room on a
multiprocessor. Here a thread takes 16 bytes, which become two pieces of 16,
and writes them where wgmma looks for them in a swizzled tile:

  rows      16 bytes of a row: t0  t1  t2  t3 ...      as copied, row by row
  operand   tiles of 8 rows of `swizzle` bytes; in a tile, the place of a piece
            in its row is XORed with the number of the row

float16 holds all values of int8 and of float8_e4m3fn exactly.
"""

import itertools
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_THREADS = 128  # of a warpgroup
_PIECE = 16  # bytes that a thread moves at once
_AHEAD = 4  # pieces that are on their way to a thread

# 4 numbers in a register, $2, become 2 in each of $0 and $1.
# Of an int8 whose first bit is flipped, 0x64 makes the float16 1152 + x.
_FROM_INT8 = """{
  .reg .b32 flipped, low, high, offset;
  xor.b32 flipped, $2, 0x80808080;
  prmt.b32 low, flipped, 0x64646464, 0x4140;
  prmt.b32 high, flipped, 0x64646464, 0x4342;
  mov.b32 offset, 0x64806480;
  sub.f16x2 $0, low, offset;
  sub.f16x2 $1, high, offset;
}"""
_FROM_FLOAT8 = """{
  .reg .b16 low, high;
  mov.b32 {low, high}, $2;
  cvt.rn.f16x2.e4m3x2 $0, low;
  cvt.rn.f16x2.e4m3x2 $1, high;
}"""


def to_float16(tile_smem, operand_smem, transforms, *, interpreted: bool):
  """Writes the numbers of a tile to an operand.

  Args:
    tile_smem: int8 or float8_e4m3fn [rows, columns], row by row.
    operand_smem: float16 of the same shape.
    transforms: of the operand: tiles of 8 rows, swizzled.
    interpreted: whether an interpreter runs it.
  """
  if interpreted:
    operand_smem[...] = tile_smem[...].astype(jnp.float32).astype(jnp.float16)
    return
  rows, columns = tile_smem.shape
  is_int = tile_smem.dtype == jnp.int8
  swizzle = transforms[1].swizzle

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.RefType(tuple(transforms)))
  )
  def widen(_, tile, operand):
    source, targets = _first_places(columns, swizzle)
    source = _at(utils.memref_ptr(tile), source)
    targets = [_at(utils.memref_ptr(operand), place) for place in targets]
    step = _rows_at_once(columns)
    starts = range(0, rows, step)
    for group in itertools.batched(starts, _AHEAD):
      # Rows that are a multiple of 8 ahead lie as far ahead, XORed alike.
      numbers = [_load(_at(source, _i32(row * columns))) for row in group]
      for row, x in zip(group, numbers, strict=True):
        ahead = _i32(row * columns * 2)
        _store(x, [_at(target, ahead) for target in targets], is_int)

  widen(tile_smem, operand_smem)


def _rows_at_once(columns):
  """Returns how many rows a warpgroup moves at once: a power of two, from 8."""
  return 1 << ((_THREADS // (columns // _PIECE)).bit_length() - 1)


def _first_places(columns, swizzle):
  """Returns where a thread reads its first piece, and where it writes it.

  Threads past the last piece do what others do.
  """
  per_row = columns // _PIECE
  piece = arith.remui(
    utils.thread_idx(), _i32(_rows_at_once(columns) * per_row)
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
  return source, targets


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


def _store(numbers, targets, is_int):
  """Writes 16 numbers to two places."""
  elements = (llvm.extractelement(numbers, _i32(i)) for i in range(4))
  wide = [half for x in elements for half in _convert(x, is_int)]
  for i, target in enumerate(targets):
    vector = llvm.mlir_undef(_words())
    for j in range(4):
      vector = llvm.insertelement(vector, wide[4 * i + j], _i32(j))
    llvm.store(vector, target, alignment=_PIECE)


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


def _at(pointer, offset):
  return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _i32(value: int) -> Any:
  return mgpu.c(value, ir.IntegerType.get_signless(32))
