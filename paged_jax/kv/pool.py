"""The physical pool of key and value pages, for all layers of a model.

Page-major: `[num_pages, num_layers, num_kv_heads, page_size, head_dim]`, one
array for K and one for V. Seen flat, layer `l` of page `p` is row
`p * num_layers + l`, so that an attention op reads a layer through the same
flat array, with its page indices moved: no slice of a layer is ever made, and
the sentinel `num_pages` stays out of range in every layer.

A pool of a quantised dtype holds a scale for each token and KV head besides
(`quantised`), laid out like the pages and treated with them.

A step writes first, then attends, and never reads the old pool again: XLA then
updates the donated pool in place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from paged_jax import devices
from paged_jax.kv import quantised
from paged_jax.typing import Leaf
from pallas_kernels.pages import copy as page_copy
from pallas_kernels.pages import write as page_write

FLOAT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
DTYPES = FLOAT_DTYPES + quantised.DTYPES
DTYPE_NAMES = "bfloat16, float16, float32, int8 or float8_e4m3fn"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPool:
  """Key and value pages of all layers."""

  k: Leaf  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  v: Leaf  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  # f32[num_pages, num_layers, num_kv_heads, page_size] of quantised pages.
  k_scales: Leaf | None = None
  v_scales: Leaf | None = None

  @property
  def num_pages(self) -> int:
    """Pages of the pool."""
    return self.k.shape[0]

  @property
  def page_size(self) -> int:
    """Tokens a page holds."""
    return self.k.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerPages:
  """The pages of one layer, as the attention ops take them."""

  k_pages: Leaf  # [num_pages, num_kv_heads, page_size, head_dim]
  v_pages: Leaf  # [num_pages, num_kv_heads, page_size, head_dim]
  k_scales: Leaf | None  # f32[num_pages, num_kv_heads, page_size] if quantised
  v_scales: Leaf | None  # f32[num_pages, num_kv_heads, page_size] if quantised
  page_indices: Leaf  # i32[num_seqs, pages_per_seq]


def init(
  num_pages: int,
  num_layers: int,
  num_kv_heads: int,
  page_size: int,
  head_dim: int,
  dtype: DTypeLike = jnp.bfloat16,
) -> KVPool:
  """Returns a pool of zeros.

  Args:
    num_pages: Pages, at least 1.
    num_layers: Layers that keep K and V in each page, at least 1.
    num_kv_heads: Key and value heads, at least 1.
    page_size: Tokens a page holds; a positive multiple of 8.
    head_dim: Width of one head, at least 1.
    dtype: bfloat16, float16 or float32; int8 or float8_e4m3fn for quantised
      pages, which have scales.

  Raises:
    ValueError: If an argument is out of its range, or if the pool would have
      2**31 token rows or more (the width of a scatter index).
  """
  shape = (num_pages, num_layers, num_kv_heads, page_size, head_dim)
  _check_sizes(shape, dtype)
  zeros = lambda: jnp.zeros(shape, dtype)
  if not quantised.is_quantised(dtype):
    return KVPool(k=zeros(), v=zeros())
  scales = lambda: jnp.zeros(shape[:-1], quantised.SCALE_DTYPE)
  return KVPool(k=zeros(), v=zeros(), k_scales=scales(), v_scales=scales())


def page_bytes(
  num_layers: int,
  num_kv_heads: int,
  page_size: int,
  head_dim: int,
  dtype: DTypeLike,
) -> int:
  """Returns the bytes of one page: K and V of all layers, and their scales."""
  row = head_dim * jnp.dtype(dtype).itemsize
  if quantised.is_quantised(dtype):
    row += quantised.SCALE_DTYPE.itemsize
  return 2 * num_layers * num_kv_heads * page_size * row


def write(
  pool: KVPool,
  layer: int,
  k: Float[Array, "num_tokens num_kv_heads head_dim"],
  v: Float[Array, "num_tokens num_kv_heads head_dim"],
  slots: Int[Array, " num_tokens"],
  *,
  debug: bool = False,
  implementation: str | None = None,
) -> KVPool:
  """Returns the pool with new tokens of one layer at their slots.

  In place when the pool is donated or carried by a loop.

  Args:
    pool: The pool; donate it, and do not read the old one after the write.
    layer: Which layer, in `[0, num_layers)`.
    k: [num_tokens, num_kv_heads, head_dim], new keys, rotated already. Cast to
      the dtype of the pool, or quantised.
    v: The same of the values.
    slots: i32[num_tokens], `page * page_size + offset` (see
      `page_table.slots`). Slots out of range are dropped; the others must
      differ from one another.
    debug: Whether to check that they do, with `checkify.check` (see
      `page_table.assert_valid`).
    implementation: `"mosaic_gpu"`, a kernel for Hopper GPUs, or `"xla"`, which
      scatters; None takes the kernel where it exists for pools of 16 bits.

  Raises:
    ValueError: If a shape does not fit the pool, `layer` is out of range, or
      `implementation` is unknown.
    NotImplementedError: If `implementation` cannot serve this pool here.
  """
  num_kv_heads, head_dim = pool.k.shape[2], pool.k.shape[4]
  num_tokens = slots.shape[0]
  _check_layer(pool, layer)
  for name, x in (("k", k), ("v", v)):
    if x.shape != (num_tokens, num_kv_heads, head_dim):
      raise ValueError(
        f"{name}.shape={x.shape} must be "
        f"{(num_tokens, num_kv_heads, head_dim)}."
      )
  implementation = devices.choose(
    implementation,
    lambda: (
      devices.why_not_hopper()
      or page_write.unsupported(pool.k.shape, pool.k.dtype, num_tokens)
    ),
    # With quantised tokens it takes 12 to 15 % longer than scatters (H200,
    # benchmarks/kv_write); float32 was not measured.
    by_default=pool.k.dtype.itemsize == 2,
  )
  if debug:
    _assert_distinct(slots, pool.num_pages * pool.page_size)
  return _write(
    pool, k, v, slots, np.int32(layer), implementation=implementation
  )


# Jitted, with the layer an argument: layers share the kernel.
@functools.partial(jax.jit, static_argnames="implementation")
def _write(
  pool: KVPool,
  k: Array,
  v: Array,
  slots: Array,
  layer: Array,
  *,
  implementation: str,
) -> KVPool:
  tokens = _stored(pool, k, v)
  if implementation == "xla":
    return _scatter(pool, tokens, slots, layer)
  return lax.platform_dependent(
    pool, tokens, slots, layer, cuda=_write_by_kernel, default=_scatter
  )


def _write_by_kernel(
  pool: KVPool, tokens: KVPool, slots: Array, layer: Array
) -> KVPool:
  arrays, structure = jax.tree.flatten(pool)
  written = page_write.write_tokens(
    tuple(arrays), tuple(jax.tree.leaves(tokens)), slots, layer
  )
  return jax.tree.unflatten(structure, written)


def _scatter(
  pool: KVPool, tokens: KVPool, slots: Array, layer: Array
) -> KVPool:
  rows = _flat_rows(slots, layer, pool.k.shape)

  def put(pages: Array, x: Array) -> Array:
    scatter = lambda pages, rows, x: pages.at[rows].set(
      x, mode="drop", unique_indices=True
    )
    row = x.shape[2:]  # none of scales
    flat = pages.reshape(-1, *row)
    flat = quantised.move(scatter, flat, rows, x.reshape(-1, *row))
    return flat.reshape(pages.shape)

  return jax.tree.map(put, pool, tokens)


def layer_pages(
  pool: KVPool,
  layer: int,
  page_indices: Int[Array, "num_seqs pages_per_seq"],
) -> LayerPages:
  """Returns the pages, scales and page indices by which to read a layer.

  Args:
    pool: The pool.
    layer: Which layer, in `[0, num_layers)`.
    page_indices: i32[num_seqs, pages_per_seq] of the page table.

  Returns:
    K and V as [num_pages * num_layers, num_kv_heads, page_size, head_dim] (a
    view of the whole pool), their scales in the same way, and the indices of
    this layer's pages in them.

  Raises:
    ValueError: If `layer` is out of range.
  """
  _check_layer(pool, layer)
  num_layers = pool.k.shape[1]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pool)
  return LayerPages(
    k_pages=flat.k,
    v_pages=flat.v,
    k_scales=flat.k_scales,
    v_scales=flat.v_scales,
    page_indices=page_indices * num_layers + layer,
  )


def copy_pages(
  pool: KVPool,
  src: Int[Array, " num_copies"],
  dst: Int[Array, " num_copies"],
  *,
  implementation: str | None = None,
) -> KVPool:
  """Returns the pool with pages copied, in all layers.

  In place when the pool is donated or carried by a loop. XLA makes one copy at
  a time, and only those that there are: most steps have none, and gathering a
  page for every row, of all layers, would take more memory than the step.

  Args:
    pool: The pool; donate it, and do not read the old one after the copy.
    src: i32[num_copies], pages to copy; clipped to the pool.
    dst: i32[num_copies], where to; `num_pages` for nothing. The others must
      differ from one another, and none of them be a source.
    implementation: `"mosaic_gpu"`, a kernel for Hopper GPUs, `"xla"`, or None
      to take the kernel where it can serve the pool.

  Raises:
    ValueError: If `src` and `dst` are not vectors of the same length, or
      `implementation` is unknown.
    NotImplementedError: If `implementation` cannot serve this pool here.
  """
  if src.ndim != 1 or src.shape != dst.shape:
    raise ValueError(
      f"{src.shape=} and {dst.shape=} must be 1-D and of equal length."
    )
  implementation = devices.choose(
    implementation, lambda: _why_not_copy_by_kernel(pool)
  )
  if implementation == "xla":
    return _copy_in_a_loop(pool, src, dst)
  # A process with a GPU may still compile for its CPU.
  return lax.platform_dependent(
    pool, src, dst, cuda=_copy_by_kernel, default=_copy_in_a_loop
  )


def _why_not_copy_by_kernel(pool: KVPool) -> str | None:
  reasons = (
    page_copy.unsupported(x.shape[1:], x.dtype) for x in jax.tree.leaves(pool)
  )
  return devices.why_not_hopper() or next(filter(None, reasons), None)


def _copy_by_kernel(pool: KVPool, src: Array, dst: Array) -> KVPool:
  arrays, structure = jax.tree.flatten(pool)
  copied = page_copy.copy_pages(tuple(arrays), src, dst)
  return jax.tree.unflatten(structure, copied)


def _copy_in_a_loop(pool: KVPool, src: Array, dst: Array) -> KVPool:
  wanted = (dst >= 0) & (dst < pool.num_pages)
  first = jnp.argsort(~wanted, stable=True)
  src, dst = jnp.clip(src[first], 0, pool.num_pages - 1), dst[first]

  def copy(i: Array, pool: KVPool) -> KVPool:
    put = lambda pages, src, dst: lax.dynamic_update_index_in_dim(
      pages, lax.dynamic_index_in_dim(pages, src), dst, 0
    )
    return jax.tree.map(
      lambda pages: quantised.move(put, pages, src[i], dst[i]), pool
    )

  num_copies = jnp.sum(wanted, dtype=jnp.int32)
  return lax.fori_loop(0, num_copies, copy, pool)


def zero_pages(pool: KVPool, pages: Int[Array, " num_zeroed"]) -> KVPool:
  """Returns the pool with some pages zeroed, in all layers.

  No op reads what a free page holds. This is for those who do not want it to
  stay in memory; see `page_table.freed_pages`.

  Args:
    pool: The pool; donate it.
    pages: i32[num_zeroed], pages; `num_pages` for nothing.

  Raises:
    ValueError: If `pages` is not a vector.
  """
  if pages.ndim != 1:
    raise ValueError(f"{pages.shape=} must be one length.")
  pages = _nowhere_if_outside(pages, pool.num_pages)
  zero = lambda x, pages: x.at[pages].set(0, mode="drop")
  return jax.tree.map(lambda x: quantised.move(zero, x, pages), pool)


def resize(pool: KVPool, num_pages: int) -> KVPool:
  """Returns a pool of another number of pages; see `page_table.resize`.

  Args:
    pool: The pool. The new one is a copy: for a while, both take memory.
    num_pages: Pages to have, at least 1. Pages from there on are lost; new
      ones are zeros.

  Raises:
    ValueError: If `num_pages` is out of its range (as in `init`).
  """
  _check_sizes((num_pages, *pool.k.shape[1:]), pool.k.dtype)
  kept = min(pool.num_pages, num_pages)

  def grown(pages: Array) -> Array:
    return jnp.pad(
      pages[:kept], ((0, num_pages - kept), *[(0, 0)] * (pages.ndim - 1))
    )

  return jax.tree.map(grown, pool)


def _check_sizes(shape: tuple[int, ...], dtype: DTypeLike) -> None:
  num_pages, num_layers, num_kv_heads, page_size, head_dim = shape
  names = ("num_pages", "num_layers", "num_kv_heads", "page_size", "head_dim")
  for name, value in zip(names, shape, strict=True):
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if page_size % 8:
    raise ValueError(f"{page_size=} must be a multiple of 8.")
  if jnp.dtype(dtype) not in DTYPES:
    raise ValueError(f"{dtype=} must be {DTYPE_NAMES}.")
  num_rows = num_pages * num_layers * num_kv_heads * page_size
  if num_rows >= 2**31:
    raise ValueError(
      f"{shape=} has {num_rows} rows of head_dim elements; the limit is "
      "2**31 - 1."
    )


def _nowhere_if_outside(pages: Array, num_pages: int) -> Array:
  """Returns `pages`, `num_pages` for all that are none: -1 would wrap."""
  return jnp.where((pages >= 0) & (pages < num_pages), pages, num_pages)


def _stored(pool: KVPool, k: Array, v: Array) -> KVPool:
  """Returns tokens as the pool stores them: cast, or quantised."""
  dtype = pool.k.dtype
  if not quantised.is_quantised(dtype):
    return KVPool(k=k.astype(dtype), v=v.astype(dtype))
  k, k_scales = quantised.quantise(k, dtype)
  v, v_scales = quantised.quantise(v, dtype)
  return KVPool(k=k, v=v, k_scales=k_scales, v_scales=v_scales)


def _check_layer(pool: KVPool, layer: int) -> None:
  if not 0 <= layer < pool.k.shape[1]:
    raise ValueError(f"{layer=} must be in [0, {pool.k.shape[1]}).")


def _assert_distinct(slots: Array, num_slots: int) -> None:
  """Checks that no slot of the pool is there twice, with `checkify.check`."""
  if slots.shape[0] < 2:
    return
  inside = (slots >= 0) & (slots < num_slots)
  in_order = jnp.sort(jnp.where(inside, slots, num_slots))
  same = (in_order[1:] == in_order[:-1]) & (in_order[1:] < num_slots)
  checkify.check(
    ~jnp.any(same),
    "Several tokens have the slot {slot}.",
    slot=in_order[jnp.argmax(same)],
  )


def _flat_rows(slots: Array, layer: Array, shape: tuple[int, ...]) -> Array:
  """Returns i32[num_tokens * num_kv_heads], rows of the pool seen flat."""
  num_pages, num_layers, num_kv_heads, page_size, _ = shape
  inside = (slots >= 0) & (slots < num_pages * page_size)
  page, offset = slots // page_size, slots % page_size
  head = jnp.arange(num_kv_heads, dtype=jnp.int32)
  page_head = (page * num_layers + layer)[:, None] * num_kv_heads + head[None]
  rows = page_head * page_size + offset[:, None]
  # Out of range, for JAX to drop. Alike for all of them: scattering promises
  # distinct rows only among those that are written.
  nowhere = num_pages * num_layers * num_kv_heads * page_size
  return jnp.where(inside[:, None], rows, nowhere).reshape(-1)
