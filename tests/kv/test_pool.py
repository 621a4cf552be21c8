import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from paged_jax import devices, dispatch
from paged_jax.kv import layout
from paged_jax.kv import pool as kv_pool

SHAPE = dict(
  num_pages=3, num_layers=2, num_kv_heads=2, page_size=8, head_dim=16
)


def _tokens(n, seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((n, 2, 16)), jnp.float32)


def test_write_puts_each_token_at_its_slot_of_its_layer_only():
  pool = kv_pool.init(**SHAPE, dtype=jnp.float32)
  k, v = _tokens(4, 0), _tokens(4, 1)
  slots = jnp.array([0, 23, 9, 7], jnp.int32)
  written = kv_pool.write(pool, 1, k, v, slots)
  expected_k = np.zeros((3, 2, 2, 8, 16), np.float32)
  expected_v = np.zeros_like(expected_k)
  for token, slot in enumerate(slots.tolist()):
    expected_k[slot // 8, 1, :, slot % 8] = k[token]
    expected_v[slot // 8, 1, :, slot % 8] = v[token]
  np.testing.assert_array_equal(np.asarray(written.k), expected_k)
  np.testing.assert_array_equal(np.asarray(written.v), expected_v)


@pytest.mark.parametrize("layer", [0, 1])
def test_slots_out_of_range_are_dropped(layer):
  pool = kv_pool.init(**SHAPE, dtype=jnp.float32)
  slots = jnp.array([24, 25, -1, 2**31 - 1, -(2**31)], jnp.int32)
  written = kv_pool.write(pool, layer, _tokens(5, 0), _tokens(5, 1), slots)
  assert not np.asarray(written.k).any()
  assert not np.asarray(written.v).any()


def test_write_casts_to_the_dtype_of_the_pool():
  pool = kv_pool.init(**SHAPE, dtype=jnp.bfloat16)
  k = _tokens(1, 0)
  written = kv_pool.write(pool, 0, k, k, jnp.array([0], jnp.int32))
  assert written.k.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(written.k[0, 0, :, 0]), np.asarray(k[0].astype(jnp.bfloat16))
  )


def test_a_layer_is_read_from_the_whole_pool():
  pool = kv_pool.init(**SHAPE, dtype=jnp.float32)
  k, v = _tokens(2, 0), _tokens(2, 1)
  pool = kv_pool.write(pool, 1, k, v, jnp.array([8, 17], jnp.int32))
  lens, table = jnp.array([20], jnp.int32), jnp.array([[1, 2, 3]], jnp.int32)
  for layer in range(2):
    kv = kv_pool.paged_kv(pool, layer, lens, table)
    flat_k, flat_v = kv.flat()
    assert flat_k.pages.shape == (6, 2, 8, 16)
    row = int(table[0, 0]) * kv.num_layers + int(kv.layer)
    for flat, whole in ((flat_k, pool.k), (flat_v, pool.v)):
      np.testing.assert_array_equal(
        np.asarray(flat.pages[row]), np.asarray(whole[1, layer])
      )


def test_a_donated_pool_is_written_in_place():
  pool = jax.eval_shape(lambda: kv_pool.init(**(SHAPE | dict(num_pages=4096))))
  tokens = jax.ShapeDtypeStruct((4, 2, 16), jnp.bfloat16)
  slots = jax.ShapeDtypeStruct((4,), jnp.int32)
  write = jax.jit(
    lambda pool, k, v, slots: kv_pool.write(pool, 0, k, v, slots),
    donate_argnums=0,
  )
  memory = write.lower(pool, tokens, tokens, slots).compile().memory_analysis()
  pool_bytes = 4096 * layout.page_bytes(2, 2, 8, 16, jnp.bfloat16)
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 100


def _lowered(platform, dtype, implementation):
  """Returns the program that writes to both layers of a pool."""
  pool = jax.eval_shape(lambda: kv_pool.init(**SHAPE, dtype=jnp.dtype(dtype)))

  def step(pool, k, v, slots):
    for layer in range(2):
      pool = kv_pool.write(
        pool, layer, k, v, slots, implementation=implementation
      )
    return pool

  tokens = jax.ShapeDtypeStruct((4, 2, 16), jnp.bfloat16)
  slots = jax.ShapeDtypeStruct((4,), jnp.int32)
  traced = jax.jit(step, donate_argnums=0).trace(pool, tokens, tokens, slots)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  ("dtype", "implementation"),
  [
    ("bfloat16", None),
    ("float16", None),
    ("float32", "mosaic_gpu"),
    ("int8", "mosaic_gpu"),
  ],
)
def test_layers_share_one_kernel_on_a_hopper_gpu(
  monkeypatch, dtype, implementation
):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  text = _lowered("cuda", dtype, implementation)
  assert text.count("custom_call @mosaic_gpu") == 1
  assert "scatter" not in text
  assert "scatter" in _lowered("cpu", dtype, implementation)


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_other_pools_use_the_kernel_only_if_requested_by_name(
  monkeypatch, dtype
):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  text = _lowered("cuda", dtype, None)
  assert "custom_call @mosaic_gpu" not in text
  assert "scatter" in text


def test_other_devices_scatter(monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: "too old.")
  text = _lowered("cuda", "bfloat16", None)
  assert "custom_call @mosaic_gpu" not in text
  assert "scatter" in text


def test_the_implementation_is_what_is_named(monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  choose = functools.partial(dispatch.kv_write, pool_shape=(9, 2, 2, 8, 16))
  for dtype, name in (("bfloat16", "mosaic_gpu"), ("float32", "xla")):
    options = dict(dtype=dtype, num_tokens=4)
    assert choose(None, **options).implementation == name
    for named in ("xla", "mosaic_gpu"):
      assert choose(named, **options).implementation == named
  monkeypatch.undo()
  pool, x = kv_pool.init(**SHAPE), _tokens(1, 0)
  write = lambda pool, name, head_dim=16: kv_pool.write(
    pool,
    0,
    x[..., :head_dim],
    x[..., :head_dim],
    jnp.zeros(1, jnp.int32),
    implementation=name,
  )
  assert write(pool, "xla").k.any()
  with pytest.raises(ValueError, match="implementation='triton'"):
    write(pool, "triton")
  monkeypatch.setattr(devices, "why_not_hopper", lambda: "too old.")
  with pytest.raises(NotImplementedError, match="not available: too old"):
    write(pool, "mosaic_gpu")
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  odd = kv_pool.init(**(SHAPE | dict(head_dim=3)))
  with pytest.raises(NotImplementedError, match="rows of 6 bytes"):
    write(odd, "mosaic_gpu", 3)
  assert write(odd, None, 3).k.any()


def test_debug_finds_tokens_that_have_one_slot():
  pool, x = kv_pool.init(**SHAPE), _tokens(4, 0)
  write = lambda slots, debug=True: kv_pool.write(
    pool, 0, x, x, slots, debug=debug
  )
  run = jax.jit(checkify.checkify(write))
  for distinct in ([3, 7, 0, 23], [24, 24, -1, -1]):
    assert run(jnp.array(distinct, jnp.int32))[0].get() is None
  twice = jnp.array([24, 7, 3, 7], jnp.int32)
  assert "slot 7 is assigned" in run(twice)[0].get()
  with pytest.raises(checkify.JaxRuntimeError, match="slot 7 is assigned"):
    write(twice)
  # Without the switch no check is compiled.
  jax.jit(lambda slots: write(slots, debug=False))(twice)


def _numbered():
  """Returns a pool in which all values differ."""
  shape = tuple(SHAPE.values())
  k = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  return kv_pool.KVPool(k=k, v=-k)


def test_copies_carry_all_layers_and_drop_what_is_no_page():
  pool = _numbered()
  src = jnp.array([0, 1, 3, 2], jnp.int32)
  for dst, expected in (
    ([2, 3, 3, 3], [0, 1, 0]),
    ([3, -1, 2**31 - 1, -(2**31)], [0, 1, 2]),
    ([3, 3, 3, 0], [2, 1, 2]),
  ):
    copied = kv_pool.copy_pages(pool, src, jnp.asarray(dst, jnp.int32))
    for before, after in ((pool.k, copied.k), (pool.v, copied.v)):
      np.testing.assert_array_equal(
        np.asarray(after), np.asarray(before)[expected]
      )


def test_zeroed_pages_are_zero_and_the_others_are_not():
  pool = _numbered()
  zeroed = kv_pool.zero_pages(pool, jnp.array([1, 3, -1, 1], jnp.int32))
  assert not zeroed.k[1].any()
  assert not zeroed.v[1].any()
  for page in (0, 2):
    np.testing.assert_array_equal(
      np.asarray(zeroed.k[page]), np.asarray(pool.k[page])
    )


def test_donated_pools_are_copied_and_zeroed_in_place():
  pool = jax.eval_shape(lambda: kv_pool.init(**(SHAPE | dict(num_pages=4096))))
  pages = jax.ShapeDtypeStruct((4,), jnp.int32)
  copy = jax.jit(kv_pool.copy_pages, donate_argnums=0).lower(pool, pages, pages)
  zero = jax.jit(kv_pool.zero_pages, donate_argnums=0).lower(pool, pages)
  page_bytes = layout.page_bytes(2, 2, 8, 16, jnp.bfloat16)
  for lowered in (copy, zero):
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4096 * page_bytes
    assert memory.temp_size_in_bytes < 16 * page_bytes


def test_page_bytes_is_what_a_page_takes():
  pool = kv_pool.init(**SHAPE, dtype=jnp.bfloat16)
  total = pool.k.nbytes + pool.v.nbytes
  assert 3 * layout.page_bytes(2, 2, 8, 16, jnp.bfloat16) == total


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_pages=0), "num_pages=0"),
    (dict(page_size=12), "page_size=12"),
    (dict(head_dim=0), "head_dim=0"),
    (dict(dtype=jnp.int16), "dtype="),
    (dict(num_pages=2**27), "rows"),
  ],
)
def test_sizes_out_of_range_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    kv_pool.init(**(SHAPE | changes))


@pytest.mark.usefixtures("unchecked_shapes")
def test_tokens_that_do_not_fit_the_pool_are_named():
  pool = kv_pool.init(**SHAPE)
  good, slots = _tokens(2, 0), jnp.zeros(2, jnp.int32)
  with pytest.raises(ValueError, match="layer=2"):
    kv_pool.write(pool, 2, good, good, slots)
  with pytest.raises(ValueError, match="layer=-1"):
    kv_pool.paged_kv(pool, -1, slots[:1], jnp.zeros((1, 1), jnp.int32))
  with pytest.raises(ValueError, match="k.shape"):
    kv_pool.write(pool, 0, good[:, :1], good, slots)
  with pytest.raises(ValueError, match="v.shape"):
    kv_pool.write(pool, 0, good, good[:1], slots)


@pytest.mark.usefixtures("unchecked_shapes")
def test_pages_that_are_not_vectors_are_named():
  pool = kv_pool.init(**SHAPE)
  pages = jnp.zeros(2, jnp.int32)
  with pytest.raises(ValueError, match="src.shape"):
    kv_pool.copy_pages(pool, pages, pages[:1])
  with pytest.raises(ValueError, match="pages.shape"):
    kv_pool.zero_pages(pool, pages[None])
