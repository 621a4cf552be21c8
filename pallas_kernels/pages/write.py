"""Writes K and V of tokens into the pages of a pool, in place.

The rows of all tokens and KV heads lie one after the other, cut into pieces of
16 bytes. A thread moves a few pieces of K and the same ones of V: it loads them
all, loads meanwhile the slots, which say where they go, and stores them.
Neighbours move neighbouring pieces, so a warp reads and writes whole sectors.

  rows     t0 h0  |  t0 h1  |  t1 h0  |  t1 h1     head_dim numbers each
  pieces  0 1 2 3 | 0 1 2 3 | ...
  pool    row (page, layer, head, offset), for each head of a token

The first thread of a row moves its scales too, if there are any. Tokens without
a place are read, and not stored: a store has a predicate, not a branch.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, Int, Real

from pallas_kernels.common import gpu
from pallas_kernels.common.rounding import cdiv
from pallas_kernels.pages.limits import WORD, unsupported_write

_THREADS = 128  # of a program, which is a warpgroup
_PROGRAMS = 4  # of a multiprocessor, before a thread gets a second piece
_MOST_PIECES = 4  # of a thread; of 16 bytes of K and V, 32 registers
_PIECE = 16  # bytes, of rows that are whole pieces; 8 or 4 of others
_NOWHERE = -1  # as a row of the pool


@functools.partial(jax.jit, static_argnames=("pieces", "interpret"))
def write_tokens(
  pools: tuple[Real[Array, "num_pages num_layers num_kv_heads ..."], ...],
  tokens: tuple[Real[Array, "num_tokens num_kv_heads ..."], ...],
  slots: Int[Array, " num_tokens"],
  layer: Int[Array, ""],
  *,
  pieces: int | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Real[Array, "num_pages num_layers num_kv_heads ..."], ...]:
  """Returns the pools with tokens written; in place if they are donated.

  Args:
    pools: K and V, [num_pages, num_layers, num_kv_heads, page_size, head_dim]
      of one dtype; then their scales, if they have any, f32 without the last
      axis.
    tokens: The same of the tokens, in the same dtypes: [num_tokens,
      num_kv_heads, head_dim], and scales without the last axis.
    slots: `page * page_size + offset`. Tokens whose slot is not in
      [0, num_pages * page_size) are dropped; the others must differ.
    layer: In [0, num_layers).
    pieces: Of K, and of V, that a thread moves at once; chosen if None.
    interpret: Parameters of the interpreter that stands in for a GPU.

  Raises:
    NotImplementedError: If the kernel does not write to such a pool.
  """
  shape, dtype = pools[0].shape, pools[0].dtype
  if reason := unsupported_write(shape, dtype, slots.shape[0]):
    raise NotImplementedError(reason)
  if slots.shape[0] == 0:
    return pools
  row_bytes = shape[-1] * dtype.itemsize
  per_row = row_bytes // math.gcd(row_bytes, _PIECE)
  num_pieces = slots.shape[0] * shape[2] * per_row
  step = _THREADS * (pieces or _pieces(num_pieces))
  kernel = plgpu.kernel(
    functools.partial(
      _body, shape, per_row, num_pieces, step, interpret is not None
    ),
    out_type=(),
    grid=(cdiv(num_pieces, step),),
    grid_names=("program",),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
    kernel_name="write_tokens",
  )
  refs = [jax.new_ref(_by_row(pool, 4)) for pool in pools]
  kernel(
    slots.astype(jnp.int32),
    layer.astype(jnp.int32).reshape(1),
    *(_by_row(x, 2) for x in tokens),
    *refs,
  )
  return tuple(
    ref[...].reshape(pool.shape) for ref, pool in zip(refs, pools, strict=True)
  )


def _pieces(num_pieces: int) -> int:
  """Returns how many a thread gets: few tokens occupy the whole GPU too."""
  threads = _THREADS * _PROGRAMS * gpu.at_hand().num_sms
  return max(1, min(_MOST_PIECES, num_pieces // threads))


def _by_row(x: Array, axes: int) -> Array:
  """Returns an array whose first axis, of so many, tells the row."""
  return x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:])


class _Pieces(NamedTuple):
  """Which pieces of an array the threads of a program move."""

  row: jax.Array  # i32[step]: of thread t, at 128 * i + t
  column: jax.Array | None = None  # i32[step] in the row; None: all of it
  per_row: int = 1  # pieces


def _body(
  shape, per_row, num_pieces, step, interpreted, slots_gmem, layer_gmem, *refs
):
  """Moves `step` pieces of K and of V, and the scales of their rows."""
  num_pages, num_layers, num_kv_heads, page_size, _ = shape
  sources, pools = refs[: len(refs) // 2], refs[len(refs) // 2 :]
  layout = plgpu.Layout.WG_STRIDED((step,), vec_size=1)
  place = plgpu.broadcasted_iota(jnp.int32, (step,), 0, layout=layout)
  place += lax.axis_index("program") * step
  row, column = _divided(jnp.minimum(place, num_pieces - 1), per_row)
  load = functools.partial(_load, interpreted=interpreted)
  store = functools.partial(_store, interpreted=interpreted)
  data = [load(x, _Pieces(row, column, per_row)) for x in sources[:2]]
  scales = [load(x, _Pieces(row)) for x in sources[2:]]
  token, head = _divided(row, num_kv_heads)
  slot, layer = load(slots_gmem, _Pieces(token)), layer_gmem[0]
  if not interpreted:
    _issue_loads()

  page, offset = _divided(slot, page_size)
  target = ((page * num_layers + layer) * num_kv_heads + head) * page_size
  stored = (slot >= 0) & (slot < num_pages * page_size) & (place < num_pieces)
  target = jnp.where(stored, target + offset, _NOWHERE)
  for pool, pieces in zip(pools[:2], data, strict=True):
    store(pool, _Pieces(target, column, per_row), pieces)
  target = jnp.where(column == 0, target, _NOWHERE)
  for pool, pieces in zip(pools[2:], scales, strict=True):
    store(pool, _Pieces(target), pieces)


def _divided(x, by: int):
  """Returns quotient and remainder of numbers that are not negative."""
  by = jnp.int32(by)
  return lax.div(x, by), lax.rem(x, by)


def _load(ref, at: _Pieces, *, interpreted: bool):
  """Returns pieces, one after the other: words, or numbers as integers."""
  if interpreted:
    return _by_piece(ref, at.per_row)[at.row, _column(at)].reshape(-1)
  step, num_bytes = at.row.size, _piece_bytes(ref, at.per_row)
  words = num_bytes // WORD
  layout = plgpu.Layout.WG_STRIDED((step * words,), vec_size=words)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), *_layouts(at)),
    return_type=plgpu.ShapeDtypeStruct(
      (step * words,), jnp.int32, layout=layout
    ),
  )
  def load(_, ref, row, column):
    pieces = row.registers.copy()
    type_ = ir.VectorType.get((words,), ir.IntegerType.get_signless(32))
    for i, place in enumerate(_places(ref, row, column, num_bytes, at.per_row)):
      pieces.flat[i] = llvm.load(type_, place, alignment=num_bytes)
    return mgpu.FragmentedArray(
      _registers=pieces, _layout=layout.to_mgpu(), _is_signed=True
    )

  return load(ref, at.row, at.column)


@plgpu.inline_mgpu()
def _issue_loads(_) -> None:
  """Keeps ptxas from loading a piece as late as where it is stored."""
  nvvm.bar_warp_sync(_i32(-1))


def _store(pool, at: _Pieces, pieces, *, interpreted: bool) -> None:
  """Stores pieces, from `_load`, in the rows that are not `_NOWHERE`."""
  if interpreted:
    row = jnp.where(at.row == _NOWHERE, pool.shape[0], at.row)
    after = _by_piece(pool, at.per_row).at[row, _column(at)]
    after = after.set(pieces.reshape(row.size, -1), mode="drop")
    after = lax.bitcast_convert_type(after.reshape(pool.shape), pool.dtype)
    pool[...] = after
    return
  num_bytes = _piece_bytes(pool, at.per_row)
  layout = plgpu.Layout.WG_STRIDED(pieces.shape, vec_size=num_bytes // WORD)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *_layouts(at), layout))
  def store(_, pool, row, column, pieces):
    places = _places(pool, row, column, num_bytes, at.per_row)
    for to, place, words in zip(
      _numbers(row), places, pieces.registers.flat, strict=True
    ):
      _store_if_somewhere(words, place, to)

  store(pool, at.row, at.column, pieces)


def _by_piece(ref, per_row: int):
  """Returns the bits of an array, [rows, per_row, numbers of a piece]."""
  bits = jnp.dtype(f"int{8 * ref.dtype.itemsize}")
  bits = lax.bitcast_convert_type(ref[...], bits)
  return bits.reshape(ref.shape[0], per_row, -1)


def _column(at: _Pieces):
  return jnp.zeros_like(at.row) if at.column is None else at.column


def _layouts(at: _Pieces):
  """Returns the layouts of row and column."""
  layout = plgpu.Layout.WG_STRIDED(at.row.shape, vec_size=1)
  return layout, None if at.column is None else layout


def _numbers(array):
  """Returns a thread's numbers of an array."""
  return [vector.extract(x, [], [0]) for x in array.registers.flat]


def _piece_bytes(ref, per_row: int) -> int:
  """Returns the bytes of a piece."""
  return math.prod(ref.shape[1:]) * ref.dtype.itemsize // per_row


def _places(ref, row, column, num_bytes: int, per_row: int):
  """Returns where a thread's pieces begin in global memory, in 64 bits."""
  i64, i8 = (ir.IntegerType.get_signless(bits) for bits in (64, 8))
  start = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))

  def ahead(places, index, size):
    offsets = [
      arith.muli(arith.extsi(i64, i), mgpu.c(size, i64))
      for i in _numbers(index)
    ]
    return [
      utils.getelementptr(place, [offset], i8)
      for place, offset in zip(places, offsets, strict=True)
    ]

  places = ahead([start] * row.registers.size, row, num_bytes * per_row)
  return places if column is None else ahead(places, column, num_bytes)


def _store_if_somewhere(words, place, row) -> None:
  """Stores words by a predicate, without a branch."""
  (n,) = ir.VectorType(words.type).shape
  registers = [llvm.extractelement(words, _i32(i)) for i in range(n)]
  width = f"v{n}.b32" if n > 1 else "b32"
  names = ", ".join(f"${i + 2}" for i in range(n))
  ptx = f"""{{
    .reg .pred stored;
    setp.ne.s32 stored, $1, {_NOWHERE};
    @stored st.global.{width} [$0], {{{names}}};
  }}"""
  constraints = ",".join(["l", *"r" * (n + 1)])
  llvm.inline_asm(
    None, [place, row, *registers], ptx, constraints, has_side_effects=True
  )


def _i32(value: int) -> Any:
  return mgpu.c(value, ir.IntegerType.get_signless(32))
