"""The kernel that copies pages: compiled on a Hopper GPU, else interpreted."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import copy as page_copy
from pallas_kernels.pages import limits

# Data and scales of K and V, or data only.
QUANTISED = [((3, 3, 8, 64), None), ((3, 3, 8), "float32")]
PAGES = {
  "bfloat16": [((1, 1, 8, 64), "bfloat16")],
  "rows of 8": [((2, 1, 24, 8), "float32")],
  "float16": [((3, 3, 8, 128), "float16")],
  "float32": [((5, 1, 8, 256), "float32")],
  "rows of 512": [((1, 1, 8, 512), "bfloat16")],
  "many tiles": [((8, 8, 16, 128), "int8"), ((8, 8, 16), "float32")],
  "few scales": [((1, 1, 8, 128), "int8"), ((1, 1, 8), "float32")],
} | {
  dtype: [(shape, name or dtype) for shape, name in QUANTISED]
  for dtype in ("int8", "float8_e4m3fn")
}


def _pools(kinds, num_pages, seed=0):
  """Returns K and V of each kind, of random bytes."""
  rng = np.random.default_rng(seed)
  return [
    np.frombuffer(
      rng.bytes(num_pages * math.prod(page) * jnp.dtype(dtype).itemsize),
      jnp.dtype(dtype),
    ).reshape(num_pages, *page)
    for page, dtype in kinds
    for _ in "kv"
  ]


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("kinds", PAGES.values(), ids=PAGES)
def test_copies_pages_of_every_pool(kinds):
  pools = _pools(kinds, 7)
  # Copies a page twice, uses the first and last page, and has four kinds of
  # invalid pages.
  src = np.asarray([4, 7, 4, 0, 6, 3, 2], np.int32)
  dst = np.asarray([5, 7, 0, -1, 1, 8, 6], np.int32)
  made = [(4, 5), (4, 0), (6, 1)]
  src[-1] = dst[-1] = 7
  copied = page_copy.copy_pages(
    tuple(jnp.asarray(pool) for pool in pools),
    jnp.asarray(src),
    jnp.asarray(dst),
    interpret=cases.INTERPRET,
  )
  for pool, after in zip(pools, copied, strict=True):
    expected = pool.copy()
    for source, target in made:
      expected[target] = pool[source]
    assert np.asarray(after).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kinds", PAGES.values(), ids=PAGES)
def test_is_one_kernel_for_a_gpu(kinds):
  pools = tuple(
    jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in _pools(kinds, 7)
  )
  pages = jax.ShapeDtypeStruct((4,), jnp.int32)
  traced = page_copy.copy_pages.trace(pools, pages, pages)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 1


def test_no_copies_are_fine():
  pool = jnp.ones((3, 1, 8, 64))
  nothing = jnp.zeros(0, jnp.int32)
  (after,) = page_copy.copy_pages((pool,), nothing, nothing)
  assert (after == pool).all()


def test_says_which_pages_it_does_not_take():
  assert limits.unsupported_copy((2, 1, 8, 128), "bfloat16") is None
  assert limits.unsupported_copy((2, 1, 8, 2), "int8") is None
  assert "(1, 1, 8, 1) int8" in limits.unsupported_copy((1, 1, 8, 1), "int8")
  pools = (jnp.zeros((3, 1, 1, 8, 1), jnp.int8),)
  with pytest.raises(NotImplementedError, match="a multiple of 16 bytes"):
    page_copy.copy_pages(pools, jnp.zeros(1, int), jnp.zeros(1, int))
