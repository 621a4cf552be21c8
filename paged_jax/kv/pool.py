"""The pool of key and value pages, for all layers of a group.

The pool is page-major: one array for K and one for V, of shape `[num_pages,
num_layers, num_kv_heads, page_size, head_dim]`. With the first two axes merged,
layer `l` of page `p` is row `p * num_layers + l`, so that attention reads every
layer through one array and one page table, and no layer is ever sliced out.

A pool of a quantised dtype also holds a scale for each token and KV head
(`quantised`), laid out like the pages.

A step writes first, then attends, and never reads the old pool again. XLA then
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

from paged_jax import dispatch
from paged_jax.kv import dtypes, quantised
from paged_jax.page_table import arguments
from paged_jax.typing import Leaf
from pallas_kernels.common.paged_kv import PagedKV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPool:
  """Key and value pages of all layers of a group."""

  k: Leaf  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  v: Leaf  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  # f32[num_pages, num_layers, num_kv_heads, page_size]; None if not quantised.
  k_scales: Leaf | None = None
  v_scales: Leaf | None = None

  @property
  def num_pages(self) -> int:
    """Number of pages of the pool."""
    return self.k.shape[0]

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self.k.shape[3]


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
    num_pages: Number of pages, at least 1.
    num_layers: Layers that store K and V in each page, at least 1.
    num_kv_heads: Number of key and value heads, at least 1.
    page_size: Tokens per page; a positive multiple of 8.
    head_dim: Width of one head, at least 1.
    dtype: bfloat16, float16 or float32; or int8 or float8_e4m3fn for quantised
      pages, which have scales.

  Raises:
    ValueError: If an argument is out of its range, or if `num_pages *
      num_layers * num_kv_heads * page_size` is 2**31 or more, the limit of a
      scatter index.
  """
  shape = (num_pages, num_layers, num_kv_heads, page_size, head_dim)
  _check_sizes(shape, dtype)
  zeros = lambda: jnp.zeros(shape, dtype)
  if not dtypes.is_quantised(dtype):
    return KVPool(k=zeros(), v=zeros())
  scales = lambda: jnp.zeros(shape[:-1], dtypes.SCALE_DTYPE)
  return KVPool(k=zeros(), v=zeros(), k_scales=scales(), v_scales=scales())


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
  """Writes the keys and values of new tokens of one layer at their slots.

  XLA updates the pool in place if it is donated or carried by a loop.

  Args:
    pool: The pool; donate it, and do not read the old one afterwards.
    layer: The layer of the group, in `[0, num_layers)`.
    k: [num_tokens, num_kv_heads, head_dim], new keys, after any rotary
      embedding. They are cast to the dtype of the pool, or quantised.
    v: New values, like `k`.
    slots: i32[num_tokens], `page * page_size + offset` (see
      `page_table.slots`). Tokens with a slot out of range are dropped; all
      other slots must be distinct.
    debug: Whether to check with `checkify.check` that slots are distinct (see
      `page_table.assert_valid`).
    implementation: `"mosaic_gpu"`, a kernel for Hopper GPUs, or `"xla"`, a
      scatter. None takes the kernel if it can serve the pool and the dtype has
      16 bits.

  Returns:
    The next pool.

  Raises:
    ValueError: If `k` or `v` does not fit the pool and `slots`, `layer` is out
      of range, or `implementation` is unknown.
    NotImplementedError: If `implementation` cannot serve this pool here.
    checkify.JaxRuntimeError: Outside jit with `debug`, if slots are not
      distinct.
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
  choice = dispatch.kv_write(
    implementation, pool.k.shape, pool.k.dtype, num_tokens
  )
  if debug:
    _assert_distinct(slots, pool.num_pages * pool.page_size)
  return _write(
    pool,
    k,
    v,
    slots,
    np.int32(layer),
    implementation=choice.implementation,
  )


# Jitted with the layer as an array, so that all layers share one kernel.
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
  from pallas_kernels.pages.write import write_tokens

  arrays, structure = jax.tree.flatten(pool)
  written = write_tokens(
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
    row = x.shape[2:]  # (head_dim,), or () for scales
    flat = pages.reshape(-1, *row)
    flat = quantised.move(scatter, flat, rows, x.reshape(-1, *row))
    return flat.reshape(pages.shape)

  return jax.tree.map(put, pool, tokens)


def paged_kv(
  pool: KVPool,
  layer: int,
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
) -> PagedKV:
  """Returns one layer's keys and values, as the attention kernels take them.

  Args:
    pool: The pool.
    layer: The layer of the group, in `[0, num_layers)`.
    kv_lens: i32[num_seqs], tokens stored in each row.
    page_indices: i32[num_seqs, pages_per_seq], from the page table.

  Raises:
    ValueError: If `layer` is out of range.
  """
  _check_layer(pool, layer)
  return PagedKV(
    k=pool.k,
    v=pool.v,
    k_scales=pool.k_scales,
    v_scales=pool.v_scales,
    layer=jnp.int32(layer),
    kv_lens=kv_lens,
    page_indices=page_indices,
  )


def copy_pages(
  pool: KVPool,
  src: Int[Array, " num_copies"],
  dst: Int[Array, " num_copies"],
  *,
  implementation: str | None = None,
) -> KVPool:
  """Copies pages within the pool, in all layers.

  XLA updates the pool in place if it is donated or carried by a loop. The
  `"xla"` implementation loops over the copies that are requested. Most steps
  request none, and gathering one page for every row, in all layers, would take
  more memory than the rest of the step.

  Args:
    pool: The pool; donate it, and do not read the old one afterwards.
    src: i32[num_copies], pages to copy; clipped to the pool.
    dst: i32[num_copies], pages to overwrite; `num_pages` for no copy. All
      others must be distinct, and none of them may be in `src`.
    implementation: `"mosaic_gpu"`, a kernel for Hopper GPUs, `"xla"`, or None
      to take the kernel if it can serve the pool.

  Returns:
    The next pool.

  Raises:
    ValueError: If `src` and `dst` are not 1-D arrays of equal length, or
      `implementation` is unknown.
    NotImplementedError: If `implementation` cannot serve this pool here.
  """
  if src.ndim != 1 or src.shape != dst.shape:
    raise ValueError(
      f"{src.shape=} and {dst.shape=} must be 1-D and of equal length."
    )
  choice = dispatch.page_copy(implementation, jax.tree.leaves(pool))
  if choice.implementation == "xla":
    return _copy_in_a_loop(pool, src, dst)
  # A process with a GPU may still compile for the CPU.
  return lax.platform_dependent(
    pool, src, dst, cuda=_copy_by_kernel, default=_copy_in_a_loop
  )


def _copy_by_kernel(pool: KVPool, src: Array, dst: Array) -> KVPool:
  from pallas_kernels.pages.copy import copy_pages as copy_by_kernel

  arrays, structure = jax.tree.flatten(pool)
  copied = copy_by_kernel(tuple(arrays), src, dst)
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
  """Sets pages to zero, in all layers.

  No op reads the contents of a free page. This is for callers who must not
  leave old keys and values in memory; see `page_table.freed_pages`.

  Args:
    pool: The pool; donate it, and do not read the old one afterwards.
    pages: i32[num_zeroed], pages; `num_pages` for none.

  Returns:
    The next pool.

  Raises:
    ValueError: If `pages` is not a 1-D array.
  """
  if pages.ndim != 1:
    raise ValueError(f"{pages.shape=} must be 1-D.")
  pages = arguments.or_none(pages, pool.num_pages)
  zero = lambda x, pages: x.at[pages].set(0, mode="drop")
  return jax.tree.map(lambda x: quantised.move(zero, x, pages), pool)


def resize(pool: KVPool, num_pages: int) -> KVPool:
  """Changes the number of pages of the pool; see also `page_table.resize`.

  Args:
    pool: The pool. The result is a copy, so both take memory until the old one
      is freed.
    num_pages: The new number of pages, at least 1. Pages from `num_pages` on
      are lost; new pages are zero.

  Returns:
    The new pool.

  Raises:
    ValueError: If `num_pages` is out of its range (see `init`).
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
  dtypes.check(dtype)
  num_rows = num_pages * num_layers * num_kv_heads * page_size
  if num_rows >= 2**31:
    raise ValueError(
      f"{shape=} has {num_rows} rows of head_dim elements, which exceed the "
      "limit of 2**31 - 1."
    )


def _stored(pool: KVPool, k: Array, v: Array) -> KVPool:
  """Returns tokens as the pool stores them: cast, or quantised."""
  dtype = pool.k.dtype
  if not dtypes.is_quantised(dtype):
    return KVPool(k=k.astype(dtype), v=v.astype(dtype))
  k, k_scales = quantised.quantise(k, dtype)
  v, v_scales = quantised.quantise(v, dtype)
  return KVPool(k=k, v=v, k_scales=k_scales, v_scales=v_scales)


def _check_layer(pool: KVPool, layer: int) -> None:
  if not 0 <= layer < pool.k.shape[1]:
    raise ValueError(f"{layer=} must be in [0, {pool.k.shape[1]}).")


def _assert_distinct(slots: Array, num_slots: int) -> None:
  """Checks with `checkify.check` that slots in range are distinct."""
  if slots.shape[0] < 2:
    return
  inside = (slots >= 0) & (slots < num_slots)
  in_order = jnp.sort(jnp.where(inside, slots, num_slots))
  same = (in_order[1:] == in_order[:-1]) & (in_order[1:] < num_slots)
  checkify.check(
    ~jnp.any(same),
    "The slot {slot} is assigned to more than one token.",
    slot=in_order[jnp.argmax(same)],
  )


def _flat_rows(slots: Array, layer: Array, shape: tuple[int, ...]) -> Array:
  """Returns i32[num_tokens * num_kv_heads], rows of the pool seen as 2-D."""
  num_pages, num_layers, num_kv_heads, page_size, _ = shape
  inside = (slots >= 0) & (slots < num_pages * page_size)
  page, offset = slots // page_size, slots % page_size
  head = jnp.arange(num_kv_heads, dtype=jnp.int32)
  page_head = (page * num_layers + layer)[:, None] * num_kv_heads + head[None]
  rows = page_head * page_size + offset[:, None]
  # One row out of range for all tokens to drop: `unique_indices` demands
  # distinct rows only among those that are written.
  nowhere = num_pages * num_layers * num_kv_heads * page_size
  return jnp.where(inside[:, None], rows, nowhere).reshape(-1)
