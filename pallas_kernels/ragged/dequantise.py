"""Ragged: dequantises 8-bit tiles to 16-bit wgmma operands in shared memory.

Mosaic's layouts would move four bytes at a time and keep many addresses in
registers. Here each thread loads a vector of 16 bytes, dequantises it to two
vectors of 16 bytes, and stores those in a swizzled tile for wgmma:

  source    row-major, 16 bytes per thread: t0  t1  t2  t3 ...
  operand   tiles of 8 rows of `swizzle` bytes; in a tile, the index of a vector
            in its row is XORed with the row

The product of an element and its row's scale is computed in float32 and rounded
once.
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

from pallas_kernels.common.ptx import VECTOR_BYTES, advance, i32

_THREADS = 128  # threads per warpgroup

# PTX that multiplies 4 elements, the bytes of $2, by $3, and rounds them to two
# elements of KIND in $0 and two in $1.
# int8 x with its sign bit flipped is x + 128. With 0x4B as the high byte, it is
# the float32 2^23 + 128 + x.
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


def dequantise(
  tile_smem,
  scales_smem,
  operand_smem,
  transforms,
  *,
  first_row: int,
  num_in_flight: int,
  interpreted: bool,
):
  """Writes rows of 8-bit elements, times their scales, to an operand.

  Args:
    tile_smem: int8 or float8_e4m3fn [rows, columns], row-major.
    scales_smem: float32 [rows], clamped to at most `largest_scale`.
    operand_smem: bfloat16 or float16, at least first_row + rows rows.
    transforms: Layout of the operand: swizzled tiles of 8 rows.
    first_row: First row of the operand to write, a multiple of 8.
    num_in_flight: Loads that a thread issues before it dequantises.
    interpreted: Whether the interpreter runs the kernel.
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
  instructions = _SCALED_INT8 if is_int else _SCALED_FLOAT8
  instructions += _SCALED.replace("KIND", kind)

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.RefType(tuple(transforms)),
    )
  )
  def write(_, tile, scales, operand):
    load_scale = lambda row, first: _load_scale(scales, row, first, limit)
    rows = dict(first_row=first_row, num_in_flight=num_in_flight)
    _dequantise_rows(
      tile, operand, shape, swizzle, instructions, load_scale, **rows
    )

  write(tile_smem, scales_smem, operand_smem)


def largest_scale(dtype: DTypeLike, kv_dtype: DTypeLike) -> float:
  """Returns the scale that maps the maximum of kv_dtype to that of dtype.

  Args:
    dtype: bfloat16 or float16.
    kv_dtype: int8 or float8_e4m3fn.
  """
  greatest = 128.0 if jnp.dtype(kv_dtype) == jnp.int8 else 448.0
  return float(jnp.finfo(dtype).max) / greatest


def _dequantise_rows(
  tile,
  operand,
  shape,
  swizzle,
  instructions,
  load_scale,
  *,
  first_row,
  num_in_flight,
):
  """Dequantises all rows, `num_in_flight` vectors per thread at a time."""
  rows, columns = shape
  first, source, targets = _first_offsets(rows, columns, swizzle)
  source = advance(utils.memref_ptr(tile), source)
  targets = [advance(utils.memref_ptr(operand), x) for x in targets]
  starts = range(0, rows, _rows_at_once(rows, columns))
  for group in itertools.batched(starts, num_in_flight):
    # A multiple of 8 rows further on, the swizzle is the same: add an offset.
    numbers = [_load(advance(source, i32(row * columns))) for row in group]
    factors = [load_scale(row, first) for row in group]
    for row, x, factor in zip(group, numbers, factors, strict=True):
      offset = i32((first_row + row) * columns * 2)
      pointers = [advance(target, offset) for target in targets]
      _store(x, pointers, instructions, factor)


def _rows_at_once(rows, columns):
  """Returns the rows that a warpgroup moves at once: a power of two, >= 8."""
  most = 1 << ((_THREADS // (columns // VECTOR_BYTES)).bit_length() - 1)
  return min(most, rows)


def _first_offsets(rows, columns, swizzle):
  """Returns a thread's first row, its source offset and two target offsets.

  Threads past the last vector repeat the work of others.
  """
  per_row = columns // VECTOR_BYTES
  vector = arith.remui(
    utils.thread_idx(), i32(_rows_at_once(rows, columns) * per_row)
  )
  row, column = (
    arith.divui(vector, i32(per_row)),
    arith.remui(vector, i32(per_row)),
  )
  byte = arith.muli(column, i32(2 * VECTOR_BYTES))
  tile = arith.divui(byte, i32(swizzle))
  # A thread writes two adjacent vectors, one per store: without a swizzle, each
  # store would hit every second vector of a row. In every second tile, threads
  # take row ^ 1, whose swizzle swaps even and odd vectors. Then eight threads
  # write to different banks.
  row = arith.xori(row, arith.andi(tile, i32(1)))
  source = arith.addi(
    arith.muli(row, i32(columns)), arith.muli(column, i32(VECTOR_BYTES))
  )
  start = _start_of_row(row, tile, 2 * columns, swizzle)
  targets = []
  for i in range(2):
    offset = arith.addi(byte, i32(i * VECTOR_BYTES))
    offset = arith.addi(start, arith.remui(offset, i32(swizzle)))
    # XOR bits 4 and up, the vector in the row, with bits 7 and up: the row, if
    # the swizzle is 128 bytes.
    row_bits = arith.andi(
      arith.shrui(offset, i32(3)), i32(swizzle - VECTOR_BYTES)
    )
    targets.append(arith.xori(offset, row_bits))
  return row, source, targets


def _start_of_row(row, tile, row_bytes, swizzle):
  """Returns the offset of a row of a tile; tiles lie in row-major order."""
  tiles = arith.muli(arith.divui(row, i32(8)), i32(row_bytes // swizzle))
  rows = arith.muli(arith.addi(tiles, tile), i32(8))
  rows = arith.addi(rows, arith.remui(row, i32(8)))
  return arith.muli(rows, i32(swizzle))


def _words():
  return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def _load(source):
  """Loads 16 elements, as four words."""
  return llvm.load(_words(), source, alignment=VECTOR_BYTES)


def _load_scale(scales, row, first, limit):
  """Loads the scale of row `first + row`, at most the limit; NaN stays NaN."""
  pointer = advance(utils.memref_ptr(scales), arith.muli(first, i32(4)))
  scale: Any = llvm.load(
    ir.F32Type.get(), advance(pointer, i32(4 * row)), alignment=4
  )
  return arith.minimumf(scale, mgpu.c(limit, ir.F32Type.get()))


def _store(numbers, targets, instructions, factor):
  """Dequantises 16 elements, and stores them as two vectors."""
  elements = (llvm.extractelement(numbers, i32(i)) for i in range(4))
  words = [
    y for x in elements for y in _dequantise_word(instructions, x, factor)
  ]
  for i, target in enumerate(targets):
    vector = llvm.mlir_undef(_words())
    for j in range(4):
      vector = llvm.insertelement(vector, words[4 * i + j], i32(j))
    llvm.store(vector, target, alignment=VECTOR_BYTES)


def _dequantise_word(instructions, word, factor):
  """Dequantises four elements to two registers of two 16-bit elements."""
  word_type = ir.IntegerType.get_signless(32)
  pair: Any = llvm.inline_asm(
    llvm.StructType.get_literal([word_type, word_type]),
    [word, factor],
    instructions,
    "=r,=r,r,f",
  )
  return [llvm.extractvalue(word_type, pair, [i]) for i in range(2)]
