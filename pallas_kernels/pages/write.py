"""Writes K and V of tokens into pages of the pool, in place.

A row is one KV head of one token. The rows of all tokens are contiguous, and
are cut into vectors of 16 bytes. A thread moves a few vectors of K and the same
vectors of V: it issues all of its loads, those of the slots last, and then
stores to the addresses that the slots give. Adjacent threads move adjacent
vectors, so that a warp reads and writes whole sectors.

  rows     t0 h0   | t0 h1   | t1 h0   | t1 h1      head_dim elements each
  vectors  0 1 2 3 | 0 1 2 3 | ...
  pool     row (page, layer, head, offset), for each head of a token

The thread of a row's first vector moves its scales too. Tokens without a slot
are loaded but not stored: stores are predicated instead of branched around.
"""

import functools
import math
from typing import NamedTuple

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
from pallas_kernels.common.ptx import VECTOR_BYTES, advance, i32
from pallas_kernels.common.rounding import cdiv
from pallas_kernels.pages.limits import WORD, unsupported_write

_THREADS = 128  # threads per program, which is one warpgroup
_PROGRAMS = 4  # programs per multiprocessor before a thread gets more vectors
_MAX_VECTORS = 4  # vectors per thread; K and V of 16 bytes take 32 registers
_DROPPED = -1  # pool row of a token that is not stored


@functools.partial(jax.jit, static_argnames=("vectors_per_thread", "interpret"))
def write_tokens(
  pools: tuple[Real[Array, "num_pages num_layers num_kv_heads ..."], ...],
  tokens: tuple[Real[Array, "num_tokens num_kv_heads ..."], ...],
  slots: Int[Array, " num_tokens"],
  layer: Int[Array, ""],
  *,
  vectors_per_thread: int | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Real[Array, "num_pages num_layers num_kv_heads ..."], ...]:
  """Writes the K and V of tokens, and their scales, to slots of a layer.

  Args:
    pools: K and V, [num_pages, num_layers, num_kv_heads, page_size, head_dim],
      both of one dtype; if quantised also their scales, f32 without the last
      axis. In place if the caller donates them.
    tokens: Rows for each of the pools, of the same dtypes: [num_tokens,
      num_kv_heads, head_dim], and scales without the last axis.
    slots: `page * page_size + offset` of each token. Tokens whose slot is
      outside [0, num_pages * page_size) are dropped; the others must differ.
    layer: In [0, num_layers).
    vectors_per_thread: Vectors of K, and of V, per thread; chosen from the
      number of tokens if None.
    interpret: Parameters of the Pallas interpreter; None compiles for a GPU.

  Returns:
    The pools with the tokens written.

  Raises:
    NotImplementedError: If the kernel does not support the pool.
  """
  shape, dtype = pools[0].shape, pools[0].dtype
  if reason := unsupported_write(shape, dtype, slots.shape[0]):
    raise NotImplementedError(reason)
  if slots.shape[0] == 0:
    return pools
  row_bytes = shape[-1] * dtype.itemsize
  # Vectors have 8 or 4 bytes if those of a row are no multiple of 16.
  per_row = row_bytes // math.gcd(row_bytes, VECTOR_BYTES)
  num_vectors = slots.shape[0] * shape[2] * per_row
  step = _THREADS * (vectors_per_thread or _vectors_per_thread(num_vectors))
  kernel = plgpu.kernel(
    functools.partial(
      _body, shape, per_row, num_vectors, step, interpret is not None
    ),
    out_type=(),
    grid=(cdiv(num_vectors, step),),
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


def _vectors_per_thread(num_vectors: int) -> int:
  """Returns vectors per thread: few, unless the GPU is fully occupied."""
  threads = _THREADS * _PROGRAMS * gpu.default_gpu().num_sms
  return max(1, min(_MAX_VECTORS, num_vectors // threads))


def _by_row(x: Array, axes: int) -> Array:
  """Merges the first `axes` axes of x into one: the rows."""
  return x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:])


class _Vectors(NamedTuple):
  """The vectors of an array that the threads of a program move."""

  row: jax.Array  # i32[step]; entry 128 * i + t is the i-th vector of thread t
  column: jax.Array | None = None  # i32[step], vector in its row; None: 0
  per_row: int = 1  # vectors per row


def _body(
  shape, per_row, num_vectors, step, interpreted, slots_gmem, layer_gmem, *refs
):
  """The program: moves `step` vectors of K and of V, and their rows' scales."""
  # 1. The vectors of each thread. Those past the end repeat the last vector.
  num_pages, num_layers, num_kv_heads, page_size, _ = shape
  sources, pools = refs[: len(refs) // 2], refs[len(refs) // 2 :]
  layout = plgpu.Layout.WG_STRIDED((step,), vec_size=1)
  index = plgpu.broadcasted_iota(jnp.int32, (step,), 0, layout=layout)
  index += lax.axis_index("program") * step
  row, column = _divided(jnp.minimum(index, num_vectors - 1), per_row)

  # 2. Issue all loads before the first store, so that their latencies overlap.
  # The slots come last: only the stores depend on them.
  load = functools.partial(_load, interpreted=interpreted)
  store = functools.partial(_store, interpreted=interpreted)
  data = [load(x, _Vectors(row, column, per_row)) for x in sources[:2]]
  scales = [load(x, _Vectors(row)) for x in sources[2:]]
  token, head = _divided(row, num_kv_heads)
  slot, layer = load(slots_gmem, _Vectors(token)), layer_gmem[0]
  if not interpreted:
    _issue_loads()

  # 3. Store. Tokens without a slot, and vectors past the end, are dropped.
  page, offset = _divided(slot, page_size)
  target = ((page * num_layers + layer) * num_kv_heads + head) * page_size
  stored = (slot >= 0) & (slot < num_pages * page_size) & (index < num_vectors)
  target = jnp.where(stored, target + offset, _DROPPED)
  for pool, vectors in zip(pools[:2], data, strict=True):
    store(pool, _Vectors(target, column, per_row), vectors)
  # 4. The thread with the first vector of a row stores its scales.
  target = jnp.where(column == 0, target, _DROPPED)
  for pool, vectors in zip(pools[2:], scales, strict=True):
    store(pool, _Vectors(target), vectors)


def _divided(x, by: int):
  """Returns quotient and remainder; x must not be negative."""
  by = jnp.int32(by)
  return lax.div(x, by), lax.rem(x, by)


def _load(ref, at: _Vectors, *, interpreted: bool):
  """Loads vectors: i32[step * words per vector]; if interpreted, elements."""
  if interpreted:
    return _by_vector(ref, at.per_row)[at.row, _column(at)].reshape(-1)
  step, num_bytes = at.row.size, _vector_bytes(ref, at.per_row)
  words = num_bytes // WORD
  layout = plgpu.Layout.WG_STRIDED((step * words,), vec_size=words)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), *_layouts(at)),
    return_type=plgpu.ShapeDtypeStruct(
      (step * words,), jnp.int32, layout=layout
    ),
  )
  def load(_, ref, row, column):
    vectors = row.registers.copy()
    type_ = ir.VectorType.get((words,), ir.IntegerType.get_signless(32))
    for i, pointer in enumerate(
      _pointers(ref, row, column, num_bytes, at.per_row)
    ):
      vectors.flat[i] = llvm.load(type_, pointer, alignment=num_bytes)
    return mgpu.FragmentedArray(
      _registers=vectors, _layout=layout.to_mgpu(), _is_signed=True
    )

  return load(ref, at.row, at.column)


@plgpu.inline_mgpu()
def _issue_loads(_) -> None:
  """Keeps ptxas from sinking the loads to the stores that use them."""
  nvvm.bar_warp_sync(i32(-1))


def _store(pool, at: _Vectors, vectors, *, interpreted: bool) -> None:
  """Stores the vectors that `_load` returned, except in rows `_DROPPED`."""
  if interpreted:
    row = jnp.where(at.row == _DROPPED, pool.shape[0], at.row)
    after = _by_vector(pool, at.per_row).at[row, _column(at)]
    after = after.set(vectors.reshape(row.size, -1), mode="drop")
    after = lax.bitcast_convert_type(after.reshape(pool.shape), pool.dtype)
    pool[...] = after
    return
  num_bytes = _vector_bytes(pool, at.per_row)
  layout = plgpu.Layout.WG_STRIDED(vectors.shape, vec_size=num_bytes // WORD)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *_layouts(at), layout))
  def store(_, pool, row, column, vectors):
    pointers = _pointers(pool, row, column, num_bytes, at.per_row)
    for to, pointer, words in zip(
      _elements(row), pointers, vectors.registers.flat, strict=True
    ):
      _store_unless_dropped(words, pointer, to)

  store(pool, at.row, at.column, vectors)


def _by_vector(ref, per_row: int):
  """Returns the bits of an array: [rows, per_row, elements per vector]."""
  bits = jnp.dtype(f"int{8 * ref.dtype.itemsize}")
  bits = lax.bitcast_convert_type(ref[...], bits)
  return bits.reshape(ref.shape[0], per_row, -1)


def _column(at: _Vectors):
  return jnp.zeros_like(at.row) if at.column is None else at.column


def _layouts(at: _Vectors):
  """Returns the layouts of row and column."""
  layout = plgpu.Layout.WG_STRIDED(at.row.shape, vec_size=1)
  return layout, None if at.column is None else layout


def _elements(array):
  """Returns the elements of an array that the thread holds."""
  return [vector.extract(x, [], [0]) for x in array.registers.flat]


def _vector_bytes(ref, per_row: int) -> int:
  """Returns the bytes per vector."""
  return math.prod(ref.shape[1:]) * ref.dtype.itemsize // per_row


def _pointers(ref, row, column, num_bytes: int, per_row: int):
  """Returns 64-bit pointers to the thread's vectors in global memory."""
  i64 = ir.IntegerType.get_signless(64)
  start = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))

  def advanced(pointers, index, size):
    offsets = [
      arith.muli(arith.extsi(i64, i), mgpu.c(size, i64))
      for i in _elements(index)
    ]
    return [
      advance(pointer, offset)
      for pointer, offset in zip(pointers, offsets, strict=True)
    ]

  pointers = advanced([start] * row.registers.size, row, num_bytes * per_row)
  return pointers if column is None else advanced(pointers, column, num_bytes)


def _store_unless_dropped(words, pointer, row) -> None:
  """Stores words if the row is not `_DROPPED`, by a predicated store."""
  (n,) = ir.VectorType(words.type).shape
  registers = [llvm.extractelement(words, i32(i)) for i in range(n)]
  width = f"v{n}.b32" if n > 1 else "b32"
  names = ", ".join(f"${i + 2}" for i in range(n))
  ptx = f"""{{
    .reg .pred stored;
    setp.ne.s32 stored, $1, {_DROPPED};
    @stored st.global.{width} [$0], {{{names}}};
  }}"""
  constraints = ",".join(["l", *"r" * (n + 1)])
  llvm.inline_asm(
    None, [pointer, row, *registers], ptx, constraints, has_side_effects=True
  )
