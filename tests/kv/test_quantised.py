"""Pools of quantised pages: tokens are read back, and scales move with data."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.kv import dtypes, layout, quantised
from paged_jax.kv import pool as kv_pool

SHAPE = dict(
  num_pages=3, num_layers=2, num_kv_heads=2, page_size=8, head_dim=16
)
DTYPES = ("int8", "float8_e4m3fn")
LARGEST = dict(int8=127, float8_e4m3fn=448)
FLOAT32_MAX = float(np.finfo(np.float32).max)
# Largest magnitudes in a row: 0, subnormal numbers, and up to the maximum.
MAGNITUDES = [0, 1e-45, 1e-40, 2e-38, 1e-30, 1e-3, 1, 500, 1e30, FLOAT32_MAX]

both = pytest.mark.parametrize("dtype", DTYPES)


def _rows(magnitudes, seed=0):
  """Returns a token for each magnitude, with two heads of 16 numbers."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((len(magnitudes), 2, 16))
  x /= np.abs(x).max(-1, keepdims=True)
  x *= np.asarray(magnitudes, np.float64)[:, None, None]
  return x.astype(np.float32)


def _written(dtype, k, v, layer=1, slots=None):
  pool = kv_pool.init(**SHAPE, dtype=jnp.dtype(dtype))
  slots = np.arange(len(k)) if slots is None else np.asarray(slots)
  return kv_pool.write(
    pool, layer, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots, jnp.int32)
  )


def _read(pool, layer=1):
  """Returns K and V by slot and head, and their scales, in float64."""
  result = []
  for data, scales in ((pool.k, pool.k_scales), (pool.v, pool.v_scales)):
    scales = np.asarray(scales[:, layer], np.float64)
    scales = scales.swapaxes(1, 2).reshape(-1, 2)
    data = np.asarray(data[:, layer], np.float64)
    data = data.swapaxes(1, 2).reshape(-1, 2, 16)
    result.append((data * scales[..., None], scales))
  return result


def _worst(dtype, x, scales):
  """Returns the largest rounding error that is allowed for each number."""
  half_step = scales[..., None] / 2
  if dtype == "float8_e4m3fn":
    # Normal numbers keep 3 bits; subnormal ones have steps of 2**-9.
    half_step = np.maximum(np.abs(x) / 16, half_step / 2**9)
  # Devices may treat subnormal float32 numbers as 0.
  return half_step * (1 + 1e-5) + np.finfo(np.float32).tiny


@both
def test_what_is_written_comes_back_within_half_a_step(dtype):
  k, v = _rows(MAGNITUDES), _rows(MAGNITUDES[::-1], 1)
  for x, (got, scales) in zip(
    (k, v), _read(_written(dtype, k, v)), strict=True
  ):
    x = x.astype(np.float64)
    got, scales = got[: len(x)], scales[: len(x)]
    assert (np.abs(got - x) <= _worst(dtype, x, scales)).all()
    # The steps are no larger than necessary.
    absmax = np.abs(x).max(-1)
    normal = absmax > 1e-30
    np.testing.assert_allclose(
      scales[normal], absmax[normal] / LARGEST[dtype], rtol=1e-6
    )


@both
@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_narrow_tokens_are_quantised_as_they_are(dtype, source):
  x = jnp.asarray(_rows([1e-3, 1, 500]), source)
  exact = np.asarray(x, np.float64)
  pool = kv_pool.init(**SHAPE, dtype=jnp.dtype(dtype))
  pool = kv_pool.write(pool, 1, x, x, jnp.arange(3, dtype=jnp.int32))
  for got, scales in _read(pool):
    assert (np.abs(got[:3] - exact) <= _worst(dtype, exact, scales[:3])).all()


@both
def test_rows_of_zeros_have_scale_zero(dtype):
  x = np.zeros((2, 2, 16), np.float32)
  data, scales = quantised.quantise(jnp.asarray(x), jnp.dtype(dtype))
  assert not np.asarray(scales).any()
  assert not np.asarray(data, np.float32).any()


@both
def test_the_largest_numbers_stay_finite_in_float32(dtype):
  x = np.full((1, 2, 16), FLOAT32_MAX, np.float32)
  data, scales = quantised.quantise(jnp.asarray(x), jnp.dtype(dtype))
  product = data.astype(jnp.float32) * scales[..., None]
  assert np.isfinite(np.asarray(product)).all()


def test_int8_rounds_to_nearest_even_and_never_to_minus_128():
  x = jnp.asarray([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 0.51]], jnp.float32)
  data, scales = quantised.quantise(x, jnp.int8)
  assert data.tolist() == [[127, 0, 2, 2, 0, -2, -127, 1]]
  assert scales.tolist() == [1.0]


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_comes_back_so_and_alone(dtype, bad):
  x = _rows([1, 2, 3])
  spoilt = x.copy()
  spoilt[1, 0, 5] = bad
  expected, _ = _read(_written(dtype, x, x))[0]
  got, _ = _read(_written(dtype, spoilt, x))[0]
  assert not np.isfinite(got[1, 0]).any()
  got[1, 0] = expected[1, 0]
  np.testing.assert_array_equal(got, expected)


@both
def test_a_token_is_stored_the_same_whatever_comes_with_it(dtype):
  x = _rows([1, 1000, 1e-6, 3])
  together = _written(dtype, x, -x)
  pool = kv_pool.init(**SHAPE, dtype=jnp.dtype(dtype))
  for i in (2, 0, 3, 1):
    one = jnp.asarray(x[i : i + 1])
    pool = kv_pool.write(pool, 1, one, -one, jnp.asarray([i], jnp.int32))
  _assert_same(pool, together)


def _assert_same(pool, expected):
  cases.assert_same_bits(jax.tree.leaves(pool), jax.tree.leaves(expected))


def _filled(dtype):
  """Returns a pool in which all rows of data and all scales differ."""
  shape = tuple(SHAPE.values())
  numbers = np.random.default_rng(0).standard_normal((2, *shape))
  arrays = [cases.quantise_rows(x, dtype) for x in numbers]
  (k, k_scales), (v, v_scales) = (map(jnp.asarray, pair) for pair in arrays)
  return kv_pool.KVPool(k=k, v=v, k_scales=k_scales, v_scales=v_scales)


@both
def test_slots_out_of_range_change_nothing(dtype):
  pool = _filled(dtype)
  slots = jnp.array([24, 25, -1, 2**31 - 1, -(2**31)], jnp.int32)
  x = jnp.asarray(_rows([1, 2, 3, 4, 5]))
  _assert_same(kv_pool.write(pool, 0, x, x, slots), pool)


@both
def test_a_write_leaves_other_rows_and_layers_alone(dtype):
  pool, x = _filled(dtype), jnp.asarray(_rows([7, 9]))
  written = kv_pool.write(pool, 1, x, x, jnp.array([9, 23], jnp.int32))
  for before, after in zip(
    jax.tree.leaves(pool), jax.tree.leaves(written), strict=True
  ):
    changed = np.asarray(before, np.float32) != np.asarray(after, np.float32)
    where = np.argwhere(changed.reshape(*changed.shape[:4], -1).any(-1))
    slots = {(page * 8 + offset, layer) for page, layer, _, offset in where}
    assert slots == {(9, 1), (23, 1)}


@both
def test_scales_are_copied_zeroed_and_resized_with_their_pages(dtype):
  pool = _filled(dtype)
  rows = lambda pool: [np.asarray(x) for x in jax.tree.leaves(pool)]
  src, dst = jnp.array([0, 1, 2], jnp.int32), jnp.array([2, 3, -1], jnp.int32)
  copied = kv_pool.copy_pages(pool, src, dst)
  zeroed = kv_pool.zero_pages(pool, jnp.array([1, 3, -1], jnp.int32))
  grown, cut = kv_pool.resize(pool, 5), kv_pool.resize(pool, 2)
  assert len(rows(pool)) == 4
  for before, *after in zip(
    *(rows(p) for p in (pool, copied, zeroed, grown, cut)), strict=True
  ):
    zero = np.zeros_like(before)
    expected = (
      before[[0, 1, 0]],
      np.stack([before[0], zero[0], before[2]]),
      np.concatenate([before, zero[:2]]),
      before[:2],
    )
    for got, want in zip(after, expected, strict=True):
      assert got.dtype == want.dtype
      assert got.shape == want.shape
      assert got.tobytes() == want.tobytes()


@both
def test_page_bytes_counts_the_scales(dtype):
  pool = kv_pool.init(**SHAPE, dtype=jnp.dtype(dtype))
  total = sum(x.nbytes for x in jax.tree.leaves(pool))
  assert 3 * layout.page_bytes(2, 2, 8, 16, dtype) == total
  # Each of 2 * 2 * 2 * 8 rows has 16 bytes of data and a scale of 4 bytes.
  assert total == 3 * 64 * 20


@both
def test_a_donated_pool_is_written_copied_and_zeroed_in_place(dtype):
  many = SHAPE | dict(num_pages=4096)
  pool = jax.eval_shape(lambda: kv_pool.init(**many, dtype=jnp.dtype(dtype)))
  tokens = jax.ShapeDtypeStruct((4, 2, 16), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((4,), jnp.int32)
  write = lambda pool, x, slots: kv_pool.write(pool, 0, x, x, slots)
  pool_bytes = 4096 * layout.page_bytes(2, 2, 8, 16, dtype)
  # XLA for CPUs has no float8 writes; see quantised.move.
  widened = dtype == "float8_e4m3fn" and jax.default_backend() == "cpu"
  for change, args in (
    (write, (tokens, pages)),
    (kv_pool.copy_pages, (pages, pages)),
    (kv_pool.zero_pages, (pages,)),
  ):
    compiled = jax.jit(change, donate_argnums=0).lower(pool, *args).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    limit = pool_bytes if widened else pool_bytes / 50
    assert memory.temp_size_in_bytes < limit


def test_the_limit_of_rows_holds_for_quantised_pools_too():
  with pytest.raises(ValueError, match="rows"):
    kv_pool.init(**(SHAPE | dict(num_pages=2**27)), dtype=jnp.int8)


def test_queries_keep_their_dtype_for_quantised_pages_only():
  for dtype in DTYPES:
    assert dtypes.query_dtype("float32", dtype) == jnp.float32
  assert dtypes.query_dtype("float32", "bfloat16") == jnp.bfloat16
