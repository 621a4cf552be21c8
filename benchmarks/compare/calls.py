"""Builds calls of the ops of a checkout, for the cases of the comparison."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.compare.checkout import Checkout
from benchmarks.harness import batches, queries
from benchmarks.harness.batches import Batch, Sizes
from benchmarks.harness.queries import Case
from pallas_kernels.common.rounding import cdiv

# Approximate speed of an H200, to estimate the time of a call.
BYTES_PER_US = 4.2e6
FLOPS_PER_US = 5.5e8


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of an op, and the state that a loop of calls carries."""

  # Returns `run(state, inputs, i) -> state`, which calls a checkout's op.
  bind: Callable[[Checkout], Callable[..., Any]]
  state: Any
  inputs: Any
  guess_us: float  # estimated time of a call


def decode(
  sizes: Sizes,
  lens: np.ndarray,
  *,
  dtype: str | None = None,
  per_head: bool = False,
  **options,
) -> Call:
  """Returns a call of decode attention, with several tables in turn."""
  batch = batches.make(sizes, lens)
  if dtype is not None:
    batch = batches.in_8_bits(batch, dtype)
  seen = lens
  if "sliding_window" in options:
    width = options["sliding_window"] + options["num_sink_tokens"]
    seen = np.minimum(lens, width)
  num_bytes = batches.num_bytes(sizes, seen.sum()) / (1 if dtype is None else 2)
  arrays = {}
  if per_head:
    slopes = 2.0 ** -(np.arange(sizes.num_q_heads) / 4 + 1)
    arrays = {
      "sinks": jnp.linspace(-2, 2, sizes.num_q_heads, dtype=jnp.float32),
      "alibi_slopes": jnp.asarray(slopes, jnp.float32),
    }

  def bind(checkout: Checkout):
    attend = functools.partial(
      checkout.paged_jax.paged_attention,
      implementation=sizes.implementation,
      **options,
    )

    def run(state, inputs, i):
      q, _ = state
      (k, v, lens, tables, *scales), arrays = inputs
      names = dict(zip(("k_scales", "v_scales"), scales, strict=False))
      return q, attend(q, k, v, lens, _table(tables, i), **names, **arrays)

    return run

  state = batch.q, jnp.zeros_like(batch.q)
  inputs = _pools(batch), arrays
  return Call(bind, state, inputs, 5 + num_bytes / BYTES_PER_US)


def ragged(
  case: Case,
  *,
  implementation: str = "mosaic_gpu",
  max_q_len: int | None = None,
) -> Call:
  """Returns a call of attention with many query tokens."""
  batch = queries.make(case)

  def bind(checkout: Checkout):
    attend = functools.partial(
      checkout.paged_jax.ragged_paged_attention,
      implementation=implementation,
      max_q_len=max_q_len,
    )

    def run(state, inputs, i):
      q, _ = state
      k, v, lens, tables, starts, active, *scales = inputs
      names = dict(zip(("k_scales", "v_scales"), scales, strict=False))
      table = _table(tables, i)
      return q, attend(q, k, v, lens, table, starts, active, **names)

    return run

  num_tokens = float(np.sum(case.q_lens) + np.sum(case.contexts))
  num_bytes = batches.num_bytes(Sizes(num_kv_heads=case.heads[1]), num_tokens)
  guess = 10 + max(num_bytes / BYTES_PER_US, case.flops / FLOPS_PER_US)
  state = batch.q, jnp.zeros_like(batch.q)
  return Call(bind, state, _pools(batch), guess)


def write(sizes: Sizes, count: int, dtype: str) -> Call:
  """Returns a call that writes to one layer of a pool."""
  num_pages = 4 * cdiv(count, sizes.page_size) + 64
  rng = np.random.default_rng(0)
  slots = rng.permutation(num_pages * sizes.page_size)[:count]
  shape = 2, count, sizes.num_kv_heads, sizes.head_dim
  k, v = jnp.asarray(rng.standard_normal(shape), batches.DTYPE)

  def bind(checkout: Checkout):
    pool_module = checkout.module("paged_jax.kv.pool", "paged_jax.kv_pool")

    def run(state, inputs, i):
      arrays, (k, v, slots) = state, inputs
      pool = pool_module.KVPool(*arrays)
      # Depends on i, so that XLA cannot hoist the call out of the loop.
      slots = lax.rem(slots + i * 0, jnp.int32(2**30))
      pool = pool_module.write(pool, 1, k, v, slots)
      return _arrays(pool)

    return run

  shape = num_pages, 2, sizes.num_kv_heads, sizes.page_size, sizes.head_dim
  state = _pool_arrays(shape, dtype)
  inputs = k, v, jnp.asarray(slots, jnp.int32)
  return Call(bind, state, inputs, 2 + 2 * k.nbytes / BYTES_PER_US)


def layers(
  num_layers: int,
  shape: tuple[int, int, int],
  lens: np.ndarray,
  *,
  implementation: str | None = None,
) -> Call:
  """Returns a call with the writes and decode attention of a model's step.

  Each row has one new token. The output of a layer is the query of the next, so
  that XLA removes no layer. All layers write the same given keys and values.
  """
  num_q_heads, num_kv_heads, head_dim = shape
  page_size, num_seqs = 16, len(lens)
  need = -(-(lens + 1) // page_size)
  num_pages = int(need.sum())
  order = np.random.default_rng(0).permutation(num_pages)
  table = np.full((num_seqs, int(need.max())), num_pages, np.int32)
  table[np.arange(table.shape[1]) < need[:, None]] = order
  slots = table[np.arange(num_seqs), lens // page_size] * page_size
  slots += lens % page_size
  rng = np.random.default_rng(1)
  rows = lambda heads: jnp.asarray(
    rng.standard_normal((num_seqs, heads, head_dim)), batches.DTYPE
  )

  def bind(checkout: Checkout):
    pool_module = checkout.module("paged_jax.kv.pool", "paged_jax.kv_pool")
    attend = _layer_attention(checkout, pool_module, implementation)

    def run(state, inputs, i):
      arrays, _ = state
      q, k, v, slots, kv_lens, table = inputs
      pool = pool_module.KVPool(*arrays)
      for layer in range(num_layers):
        pool = pool_module.write(
          pool, layer, k, v, slots, implementation=implementation
        )
        # Depends on i, so that XLA cannot hoist the call out of the loop.
        q = attend(q, pool, layer, kv_lens + i * 0, table)
      return _arrays(pool), q

    return run

  q, k, v = rows(num_q_heads), rows(num_kv_heads), rows(num_kv_heads)
  pool_shape = num_pages, num_layers, num_kv_heads, page_size, head_dim
  state = _pool_arrays(pool_shape, "bfloat16"), jnp.zeros_like(q)
  as_i32 = lambda x: jnp.asarray(x, jnp.int32)
  inputs = q, k, v, as_i32(slots), as_i32(lens + 1), as_i32(table)
  num_bytes = 4.0 * num_layers * num_kv_heads * head_dim * float(lens.sum())
  guess = num_layers * 12 + num_bytes / BYTES_PER_US
  return Call(bind, state, inputs, guess)


def _layer_attention(
  checkout: Checkout, pool_module: Any, implementation: str | None
):
  """Returns attention to one layer of a pool, by the API of the checkout."""
  if hasattr(pool_module, "layer_pages"):

    def attend(q, pool, layer, kv_lens, table):
      pages = pool_module.layer_pages(pool, layer, table)
      return checkout.paged_jax.paged_attention(
        q,
        pages.k_pages,
        pages.v_pages,
        kv_lens,
        pages.page_indices,
        implementation=implementation,
      )

    return attend
  ops = checkout.module("paged_jax.ops.attention")
  spec = checkout.module("pallas_kernels.common.spec")

  def attend_from_pool(q, pool, layer, kv_lens, table):
    kv = pool_module.paged_kv(pool, layer, kv_lens, table)
    scale = spec.AttentionSpec(scale=q.shape[-1] ** -0.5)
    arrays = spec.AttentionArrays()
    return ops.attend_decode(q, kv, arrays, scale, implementation)[0]

  return attend_from_pool


def _pools(batch: Batch) -> tuple:
  pools = batch.k_pages, batch.v_pages
  return (*pools, batch.kv_lens, batch.tables, *batch.more)


def _table(tables, i):
  turn = lax.rem(i, jnp.int32(tables.shape[0]))
  return lax.dynamic_index_in_dim(tables, turn, keepdims=False)


def _pool_arrays(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
  """Returns the arrays of a pool of random numbers."""
  make = jax.jit(
    lambda key: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
  )
  pool = tuple(make(jax.random.key(i, impl="rbg")) for i in range(2))
  if dtype != "int8":
    return pool
  return (*pool, *(jnp.ones(shape[:-1], jnp.float32) for _ in range(2)))


def _arrays(pool: Any) -> tuple[jax.Array, ...]:
  """Returns the arrays of a pool, without those that are None."""
  arrays = pool.k, pool.v, pool.k_scales, pool.v_scales
  return tuple(x for x in arrays if x is not None)
