"""The calls that two checkouts are compared by."""

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
from benchmarks.harness.queries import Case as QueryCase

# Microseconds from bytes or operations: about the speed of an H200.
BYTES_PER_US = 4.2e6
FLOPS_PER_US = 5.5e8


@dataclasses.dataclass(frozen=True)
class Case:
  """A call, and the state that a loop of it carries."""

  # Returns `run(state, inputs, i) -> state` of a checkout.
  bind: Callable[[Checkout], Callable[..., Any]]
  state: Any
  inputs: Any
  guess_us: float  # of a call


def all_cases(*, small: bool) -> dict[str, Callable[[], Case]]:
  """Returns what makes each case, by its name."""
  if small:
    return _small()
  sizes = Sizes()
  made: dict[str, Callable[[], Case]] = {}
  fixed = {
    "decode 64 x 8k": (sizes, 64, 8192),
    "decode 64 x 8k, pages of 64": (_with(sizes, page_size=64), 64, 8192),
    "decode 64 x 2k": (sizes, 64, 2048),
    "decode 256 x 1k": (sizes, 256, 1024),
    "decode 16 x 32k": (sizes, 16, 32768),
    "decode 1 x 128k": (sizes, 1, 131072),
    "decode 8 x 4k": (sizes, 8, 4096),
    "decode 1 x 8k": (sizes, 1, 8192),
    "decode 64 x 4k, 32 KV heads": (_with(sizes, num_kv_heads=32), 64, 4096),
    "decode 64 x 4k, 1 KV head": (_with(sizes, num_kv_heads=1), 64, 4096),
  }
  for name, (each, count, length) in fixed.items():
    lens = np.full(count, length)
    made[name] = functools.partial(_decode, each, lens)
  rng = np.random.default_rng(7)
  ragged = np.exp(rng.uniform(np.log(128), np.log(16384), 128)).astype(int)
  made["decode 128, 128 to 16k"] = functools.partial(_decode, sizes, ragged)
  long = np.full(64, 8192)
  for dtype in ("int8", "float8_e4m3fn"):
    made[f"decode 64 x 8k, {dtype}"] = functools.partial(
      _decode, sizes, long, dtype=dtype
    )
  made["decode 64 x 8k, batch-invariant"] = functools.partial(
    _decode, sizes, long, batch_invariant=True
  )
  made["decode 64 x 8k, sinks, ALiBi, cap"] = functools.partial(
    _decode, sizes, long, per_head=True, logits_soft_cap=30.0
  )
  made["decode 8 x 128k, window of 4k"] = functools.partial(
    _decode, sizes, np.full(8, 131072), sliding_window=4096, num_sink_tokens=4
  )
  made["64 x 8k, 4 query tokens"] = functools.partial(
    _queries, QueryCase((4,) * 64, (8188,) * 64), max_q_len=4
  )
  prompts = {
    "1 x 4k": QueryCase((4096,), (0,)),
    "4 x 4k": QueryCase((4096,) * 4, (0,) * 4),
    "1 x 16k": QueryCase((16384,), (0,)),
    "8 x 1k": QueryCase((1024,) * 8, (0,) * 8),
    "8 x 512 on 4k": QueryCase((512,) * 8, (4096,) * 8),
    "1 x 4k, 32 KV heads": QueryCase((4096,), (0,), heads=(32, 32)),
    "4 x 4k, int8": QueryCase((4096,) * 4, (0,) * 4, kv_dtype="int8"),
    "mixed, 64 x 4k and 2 x 2k": QueryCase(
      (1,) * 64 + (2048,) * 2, (4095,) * 64 + (0,) * 2
    ),
    "few, 3 x 100 on 2k": QueryCase((100,) * 3, (2048,) * 3),
  }
  for name, query in prompts.items():
    made[f"prefill {name}"] = functools.partial(_queries, query)
  for count in (64, 8192):
    for dtype in ("bfloat16", "int8"):
      made[f"write {count} tokens, {dtype}"] = functools.partial(
        _write, sizes, count, dtype
      )
  for num_layers, shape in ((30, (9, 3, 64)), (32, (32, 8, 128))):
    for count in (8, 256):
      made[f"{num_layers} layers, {count} x 1k"] = functools.partial(
        _layers, num_layers, shape, np.full(count, 1024)
      )
  return made


def _small() -> dict[str, Callable[[], Case]]:
  sizes, lens = batches.SMALL, np.array([9, 17, 30])
  query = QueryCase((5, 9), (0, 7), head_dim=16, heads=(4, 2))
  return {
    "decode": functools.partial(_decode, sizes, lens),
    "prefill": functools.partial(_queries, query, by="xla"),
    "write": functools.partial(_write, sizes, 5, "bfloat16"),
    "layers": functools.partial(_layers, 3, (4, 2, 16), lens, by="xla"),
  }


def _with(sizes: Sizes, **changes) -> Sizes:
  return dataclasses.replace(sizes, **changes)


def _decode(
  sizes: Sizes,
  lens: np.ndarray,
  *,
  dtype: str | None = None,
  per_head: bool = False,
  **options,
) -> Case:
  """Decode attention, by several tables in turn."""
  batch = batches.make(sizes, lens)
  if dtype is not None:
    batch = batches.in_8_bits(batch, dtype)
  seen = lens if "sliding_window" not in options else np.minimum(lens, 4100)
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
  return Case(bind, state, inputs, 5 + num_bytes / BYTES_PER_US)


def _queries(
  case: QueryCase, *, by: str = "mosaic_gpu", max_q_len: int | None = None
) -> Case:
  """Attention of many query tokens."""
  batch = queries.make(case)

  def bind(checkout: Checkout):
    attend = functools.partial(
      checkout.paged_jax.ragged_paged_attention,
      implementation=by,
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
  return Case(bind, state, _pools(batch), guess)


def _write(sizes: Sizes, count: int, dtype: str) -> Case:
  """Writes of one layer of a pool."""
  num_pages = 4 * -(-count // sizes.page_size) + 64
  rng = np.random.default_rng(0)
  slots = rng.permutation(num_pages * sizes.page_size)[:count]
  shape = 2, count, sizes.num_kv_heads, sizes.head_dim
  k, v = jnp.asarray(rng.standard_normal(shape), batches.DTYPE)

  def bind(checkout: Checkout):
    pool_module = checkout.module("paged_jax.kv.pool", "paged_jax.kv_pool")

    def run(state, inputs, i):
      arrays, (k, v, slots) = state, inputs
      pool = pool_module.KVPool(*arrays)
      slots = lax.rem(slots + i * 0, jnp.int32(2**30))
      pool = pool_module.write(pool, 1, k, v, slots)
      return _arrays(pool)

    return run

  shape = num_pages, 2, sizes.num_kv_heads, sizes.page_size, sizes.head_dim
  state = _pool_arrays(shape, dtype)
  inputs = k, v, jnp.asarray(slots, jnp.int32)
  return Case(bind, state, inputs, 2 + 2 * k.nbytes / BYTES_PER_US)


def _layers(
  num_layers: int,
  shape: tuple[int, int, int],
  lens: np.ndarray,
  *,
  by: str | None = None,
) -> Case:
  """Writes and decode attention of all layers of a model, as its step has them.

  One new token a row. The output of a layer is the query of the next, so that
  all layers are needed; keys and values are given, and the same in all layers.
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
    attend = _layer_attention(checkout, pool_module, by)

    def run(state, inputs, i):
      arrays, _ = state
      q, k, v, slots, kv_lens, table = inputs
      pool = pool_module.KVPool(*arrays)
      for layer in range(num_layers):
        pool = pool_module.write(pool, layer, k, v, slots, implementation=by)
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
  return Case(bind, state, inputs, guess)


def _layer_attention(checkout: Checkout, pool_module: Any, by: str | None):
  """Returns attention to one layer of a pool, as the checkout does it."""
  if hasattr(pool_module, "layer_pages"):

    def attend(q, pool, layer, kv_lens, table):
      pages = pool_module.layer_pages(pool, layer, table)
      return checkout.paged_jax.paged_attention(
        q,
        pages.k_pages,
        pages.v_pages,
        kv_lens,
        pages.page_indices,
        implementation=by,
      )

    return attend
  ops = checkout.module("paged_jax.ops.attention")
  spec = checkout.module("pallas_kernels.common.spec")

  def attend_from_pool(q, pool, layer, kv_lens, table):
    kv = pool_module.paged_kv(pool, layer, kv_lens, table)
    scale = spec.AttentionSpec(scale=q.shape[-1] ** -0.5)
    arrays = spec.AttentionArrays()
    return ops.attend_decode(q, kv, arrays, scale, by)[0]

  return attend_from_pool


def _pools(batch: Batch) -> tuple:
  pools = batch.k_pages, batch.v_pages
  return (*pools, batch.kv_lens, batch.tables, *batch.more)


def _table(tables, i):
  turn = lax.rem(i, jnp.int32(tables.shape[0]))
  return lax.dynamic_index_in_dim(tables, turn, keepdims=False)


def _pool_arrays(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
  """Returns the arrays of a pool, of random numbers."""
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
