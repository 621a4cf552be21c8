"""Batches of sequences for attention, in pages at random places."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_jax.kv.quantised import quantise

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of heads, pages and timing loops."""

  implementation: str = "mosaic_gpu"
  num_q_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  page_size: int = 16
  loop_us: float = 100_000  # about; the host sees the end of a loop 1 ms late
  num_loops: int = 5
  slow_loops: int = 3  # of plain JAX, which is slow, with fewer calls each
  apart_bytes: int = 2**29  # least bytes read before a page is read again


FULL = Sizes()
SMALL = Sizes(
  implementation="xla",
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=16,
  loop_us=30,
  num_loops=2,
  slow_loops=2,
  apart_bytes=0,
)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Sequences in a pool, with several page tables that are used in turn."""

  q: jax.Array  # [num_tokens, num_q_heads, head_dim]
  k_pages: jax.Array  # [num_pages, num_kv_heads, page_size, head_dim]
  v_pages: jax.Array
  kv_lens: jax.Array  # i32[num_seqs]
  tables: jax.Array  # i32[num_tables, num_seqs, pages_per_seq]
  more: tuple[jax.Array, ...] = ()  # arguments that follow the table


def make(
  sizes: Sizes,
  lens: np.ndarray,
  *,
  page_size: int | None = None,
  num_new: int = 0,
) -> Batch:
  """Returns sequences in pages at random places, and a query for each.

  The tokens of a sequence do not depend on the page size.

  Args:
    sizes: Sizes of the benchmark.
    lens: i64[num_seqs], tokens of each sequence.
    page_size: Page size of the pool; `sizes.page_size` if None.
    num_new: Further tokens for which each sequence has room.
  """
  page_size = page_size or sizes.page_size
  num_seqs, most = len(lens), int(lens.max()) + num_new
  need = -(-(lens + num_new) // page_size)
  apart = sizes.apart_bytes / num_bytes(sizes, lens.sum())
  num_tables = max(2, int(np.ceil(apart)))
  shape = num_tables, num_seqs, int(need.max())
  mapped = np.broadcast_to(np.arange(shape[2]) < need[:, None], shape)
  num_used = int(mapped.sum())
  num_pages = num_used + num_used // 8 + 1
  pages = np.random.default_rng(page_size).permutation(num_pages)[:num_used]
  tables = np.full(shape, num_pages, np.int32)
  tables[mapped] = pages
  rows = np.arange(num_tables * num_seqs).reshape(*shape[:2], 1) * most
  starts = np.full(num_pages, -1, np.int32)  # the first token of each page
  starts[pages] = (rows + np.arange(shape[2]) * page_size)[mapped]
  fill = functools.partial(
    _pool, starts, page_size, sizes.num_kv_heads, sizes.head_dim
  )
  return Batch(
    random_queries(sizes, num_seqs),
    fill(1),
    fill(2),
    jnp.asarray(lens, jnp.int32),
    jnp.asarray(tables),
  )


def in_8_bits(batch: Batch, dtype: str) -> Batch:
  """Returns the batch with quantised pages; `more` ends with their scales."""
  narrow = jax.jit(functools.partial(quantise, dtype=dtype))
  k_pages, k_scales = narrow(batch.k_pages)
  v_pages, v_scales = narrow(batch.v_pages)
  return dataclasses.replace(
    batch,
    k_pages=k_pages,
    v_pages=v_pages,
    more=(*batch.more, k_scales, v_scales),
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pool(starts, page_size, num_kv_heads, head_dim, salt):
  """Returns pages of pseudo-random values, and NaN in free pages.

  Values depend on the token, head and column, and on `salt`.
  """
  shape = len(starts), num_kv_heads, page_size, head_dim
  slots = lax.broadcasted_iota(jnp.int32, (shape[0], page_size), 1)
  tokens = (starts[:, None] + slots).astype(jnp.uint32)
  axes = (
    lax.broadcast_in_dim(tokens, shape, (0, 2)),
    *(lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 3)),
  )
  bits = jnp.asarray(salt, jnp.uint32)
  for numbers in axes:
    bits = _mix(bits ^ numbers)
  free = lax.broadcast_in_dim(starts < 0, shape, (0,))
  return jnp.where(free, jnp.nan, uniform(bits)).astype(DTYPE)


def _mix(bits):
  """Mixes 32 bits, like the last steps of murmur3."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
  return bits ^ (bits >> jnp.uint32(16))


def uniform(bits):
  """Returns pseudo-random f32 in [-1, 1).

  `jax.random` would need several times the memory of a pool.
  """
  bits = _mix(bits) >> jnp.uint32(8)
  return bits.astype(jnp.float32) * jnp.float32(2**-23) - jnp.float32(1)


def random_queries(sizes: Sizes, count: int) -> jax.Array:
  """Returns `count` query tokens of normally distributed numbers."""
  shape = count, sizes.num_q_heads, sizes.head_dim
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), DTYPE)


def num_bytes(sizes: Sizes, num_tokens: float) -> float:
  """Returns the bytes of the keys and values of `num_tokens` tokens."""
  token = sizes.num_kv_heads * sizes.head_dim * jnp.dtype(DTYPE).itemsize
  return 2 * token * float(num_tokens)
