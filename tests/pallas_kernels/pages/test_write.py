"""The kernel that writes tokens: compiled on a Hopper GPU, else interpreted."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import limits
from pallas_kernels.pages import write as page_write

NUM_PAGES, NUM_LAYERS = 5, 2
# num_kv_heads, page_size, head_dim, dtype. Rows are 4 to 64 vectors of 16
# bytes; the last two kinds have vectors of 8 and 4 bytes.
KINDS = {
  "bfloat16": (2, 16, 128, "bfloat16"),
  "float16": (3, 8, 80, "float16"),
  "float32": (1, 24, 256, "float32"),
  "int8": (2, 8, 64, "int8"),
  "float8": (3, 16, 192, "float8_e4m3fn"),
  "vectors of 8": (1, 8, 72, "int8"),
  "vectors of 4": (2, 8, 66, "bfloat16"),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def _random(rng, shape, dtype):
  """Returns numbers of random bits, most of them NaN with different bits."""
  dtype = jnp.dtype(dtype)
  num_bytes = math.prod(shape) * dtype.itemsize
  some = np.asarray([0x7F, 0xFF, 0xC1, 0x02], np.uint8)
  data = rng.choice(some, num_bytes)
  return data.view(dtype).reshape(shape)


def _arrays(kind, num_tokens, num_pages=NUM_PAGES, seed=0):
  """Returns pools and tokens: K and V, and scales for 8-bit dtypes."""
  num_kv_heads, page_size, head_dim, dtype = kind
  rng = np.random.default_rng(seed)
  pool = num_pages, NUM_LAYERS, num_kv_heads, page_size
  token = num_tokens, num_kv_heads
  rows = [((head_dim,), dtype)] * 2
  if jnp.dtype(dtype).itemsize == 1:
    rows += [((), "float32")] * 2
  return (
    [_random(rng, pool + row, of) for row, of in rows],
    [_random(rng, token + row, of) for row, of in rows],
  )


def _slots(kind, num_tokens, num_pages=NUM_PAGES, seed=0):
  """Returns random slots, with the first and last and some out of range."""
  num_slots = num_pages * kind[1]
  rng = np.random.default_rng(seed)
  inner = 1 + rng.permutation(num_slots - 2)
  nowhere = [num_slots, -1, num_slots + 1, -(2**31), 2**31 - 1, -num_slots]
  ends = [num_slots - 1, *nowhere, 0]
  slots = np.concatenate([ends, inner])[:num_tokens]
  return rng.permutation(slots).astype(np.int32)


def _expected(pools, tokens, slots, layer):
  """Returns the pools after NumPy wrote one token after the other."""
  result = []
  for pool, rows in zip(pools, tokens, strict=True):
    bits = f"u{pool.itemsize}"
    after = pool.copy().view(bits)
    page_size = pool.shape[3]
    for row, slot in zip(rows.view(bits), slots.tolist(), strict=True):
      if 0 <= slot < len(pool) * page_size:
        after[slot // page_size, layer, :, slot % page_size] = row
    result.append(after)
  return result


def _written(pools, tokens, slots, layer, **options):
  as_jax = lambda arrays: tuple(map(jnp.asarray, arrays))
  return page_write.write_tokens(
    as_jax(pools),
    as_jax(tokens),
    jnp.asarray(slots),
    jnp.asarray(layer, jnp.int32),
    interpret=cases.INTERPRET,
    **options,
  )


def _assert_written(kind, num_tokens, layer=1, num_pages=NUM_PAGES, **options):
  pools, tokens = _arrays(kind, num_tokens, num_pages)
  slots = _slots(kind, num_tokens, num_pages)
  written = _written(pools, tokens, slots, layer, **options)
  expected = _expected(pools, tokens, slots, layer)
  for after, before, want in zip(written, pools, expected, strict=True):
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert np.asarray(after).tobytes() == want.tobytes()


@pytest.mark.slow(quick=2)
@kinds
def test_each_token_is_at_its_slot_and_nothing_else_changes(kind):
  _assert_written(kind, 37)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33])
def test_any_number_of_tokens_in_any_layer(num_tokens, layer):
  for name in ("bfloat16", "int8"):
    _assert_written(KINDS[name], num_tokens, layer)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_threads_may_have_several_vectors(pieces):
  for name in ("float16", "float8"):
    _assert_written(KINDS[name], 40, vectors_per_thread=pieces)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_no_tokens_and_tokens_of_no_place_change_nothing(name):
  for slots in ([], [80, -1, 2**31 - 1]):
    slots = np.asarray(slots, np.int32)
    pools, tokens = _arrays(KINDS[name], len(slots))
    for before, after in zip(
      pools, _written(pools, tokens, slots, 0), strict=True
    ):
      assert np.asarray(after).tobytes() == before.tobytes()


@pytest.mark.gpu
@kinds
def test_many_tokens_are_written_by_a_whole_gpu(kind):
  _, page_size, head_dim, dtype = kind
  many = 8, page_size, head_dim, dtype
  for num_tokens in (700, 4099):
    _assert_written(many, num_tokens, num_pages=8192 // page_size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pools_may_have_more_than_2_to_the_31_elements(dtype):
  page, num_tokens = (2, 8, 16, 128), 300
  num_pages = 2**31 // math.prod(page) + 1000
  _, tokens = _arrays((8, 16, 128, dtype), num_tokens)
  # No byte of the tokens and scales is 0.
  pools = tuple(
    jax.jit(jnp.zeros, static_argnums=(0, 1))(
      (num_pages, *page[: x.ndim + 1]), x.dtype
    )
    for x in tokens
  )
  rng = np.random.default_rng(0)
  slots = num_pages * 16 - 2 - rng.permutation(15_000)[:num_tokens]
  slots[:3] = num_pages * 16 - 1, 0, 2**31 // math.prod(page) * 16
  write = jax.jit(page_write.write_tokens, donate_argnums=0)
  written = write(
    pools,
    tuple(map(jnp.asarray, tokens)),
    jnp.asarray(slots, jnp.int32),
    jnp.asarray(1, jnp.int32),
  )
  pages, place = np.unique(slots // 16, return_inverse=True)
  is_page = np.isin(np.arange(num_pages), pages)
  for pool, rows in zip(written, tokens, strict=True):
    bits = jnp.dtype(f"int{8 * pool.dtype.itemsize}")
    are_touched = jax.jit(_pages_that_are_not_zero, static_argnums=1)
    np.testing.assert_array_equal(are_touched(pool, bits), is_page)
    few = np.zeros((len(pages), *pool.shape[1:]), pool.dtype)
    few_slots = place * 16 + slots % 16
    (expected,) = _expected([few], [rows], few_slots, 1)
    assert np.asarray(pool[jnp.asarray(pages)]).tobytes() == expected.tobytes()


def _pages_that_are_not_zero(pool, bits):
  bits = jax.lax.bitcast_convert_type(pool, bits)
  return (bits != 0).any(axis=range(1, pool.ndim))


def _lowered(kind, num_tokens=64):
  shapes = lambda arrays: tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays
  )
  pools, tokens = map(shapes, _arrays(kind, num_tokens))
  int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  write = jax.jit(page_write.write_tokens, donate_argnums=0)
  traced = write.trace(pools, tokens, int32((num_tokens,)), int32(()))
  return pools, traced.lower(lowering_platforms=("cuda",))


@kinds
def test_is_one_kernel_for_a_gpu_that_writes_in_place(kind):
  pools, lowered = _lowered(kind)
  text = lowered.as_text()
  assert text.count("custom_call @mosaic_gpu") == 1
  (call,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
  # All outputs are pools, and each aliases its operand.
  assert call.count("output_operand_alias<") == len(pools)
  assert text.count("tf.aliasing_output") == len(pools)


def test_says_which_pools_it_does_not_take():
  shape = 3, 2, 2, 8, 64
  assert limits.unsupported_write(shape, "int8", 10) is None
  assert limits.unsupported_write((*shape[:-1], 4), "int8", 10) is None
  reason = limits.unsupported_write((*shape[:-1], 5), "bfloat16", 10)
  assert "rows of 10 bytes" in reason
  assert limits.unsupported_write((2**27 - 1, 1, *shape[2:]), "int8", 1) is None
  assert "rows" in limits.unsupported_write((2**27, 1, *shape[2:]), "int8", 1)
  assert limits.unsupported_write(shape, "int8", 2**25 - 1) is None
  assert "4 GiB" in limits.unsupported_write(shape, "int8", 2**25)
  pools, tokens = _arrays((2, 8, 5, "bfloat16"), 3)
  with pytest.raises(NotImplementedError, match="rows of 10 bytes"):
    _written(pools, tokens, np.arange(3, dtype=np.int32), 0)
