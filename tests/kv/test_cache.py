import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from pages import i32

from paged_jax import page_table
from paged_jax.kv import cache as paged_cache
from paged_jax.kv import pool as kv_pool

SIZES = dict(
  num_pages=8,
  page_size=8,
  num_seqs=3,
  pages_per_seq=2,
  num_layers=2,
  num_kv_heads=1,
  head_dim=8,
  dtype=jnp.float32,
)


def _write(cache, step, value):
  """Writes each token's row, position and layer, told apart by `value`."""
  pool = cache.pool
  token = jnp.arange(len(step.slots), dtype=jnp.int32)
  row = jnp.searchsorted(step.cu_q_lens[1:], token, side="right")
  tokens = value + 100 * row.astype(jnp.int32) + step.positions
  x = jnp.broadcast_to(
    tokens[:, None, None].astype(jnp.float32), (len(tokens), 1, 8)
  )
  for layer in range(2):
    pool = kv_pool.write(pool, layer, x + layer / 2, x, step.slots)
  return dataclasses.replace(cache, pool=pool)


def _read(cache, row):
  pages = np.asarray(cache.table.page_indices[row])
  tokens = np.asarray(cache.pool.k).take(pages, axis=0, mode="clip")
  return tokens[:, 1, 0, :, 0].reshape(-1)[: int(cache.table.kv_lens[row])]


def _forked():
  """Rows 0 to 2 share 5 tokens."""
  cache = paged_cache.init(**SIZES)
  cache, step = paged_cache.begin_step(cache, i32(5, 0, 0), 5)
  cache = _write(cache, step, 0)
  table = page_table.fork(cache.table, i32(0, 0), i32(1, 2)).table
  return dataclasses.replace(cache, table=table)


def test_decode_copies_shared_pages_before_it_writes():
  cache, step = paged_cache.begin_decode(_forked(), jnp.array([True] * 3))
  assert step.ok.all()
  cache = _write(cache, step, 1000)
  prompt = [0.5, 1.5, 2.5, 3.5, 4.5]
  for row in range(3):
    np.testing.assert_array_equal(
      _read(cache, row), [*prompt, 1005.5 + 100 * row]
    )


def test_a_step_copies_shared_pages_before_it_writes():
  cache, step = paged_cache.begin_step(_forked(), i32(0, 4, 2), 8)
  assert step.ok.tolist() == [False, True, True]
  cache = _write(cache, step, 1000)
  prompt = [0.5, 1.5, 2.5, 3.5, 4.5]
  np.testing.assert_array_equal(_read(cache, 0), prompt)
  first = [1105.5, 1106.5, 1107.5, 1108.5]
  np.testing.assert_array_equal(_read(cache, 1), prompt + first)
  np.testing.assert_array_equal(_read(cache, 2), [*prompt, 1205.5, 1206.5])


def test_a_decode_step_makes_no_second_pool():
  sizes = SIZES | dict(num_pages=4096)
  cache = jax.eval_shape(lambda: paged_cache.init(**sizes))
  rows = jax.ShapeDtypeStruct((3,), jnp.bool_)
  step = jax.jit(paged_cache.begin_decode, donate_argnums=0)
  memory = step.lower(cache, rows).compile().memory_analysis()
  pool_bytes = cache.pool.k.size * 4 * 2
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 50
