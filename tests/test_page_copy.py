"""The kernel that copies pages: interpreted, or on a Hopper GPU as it is."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import page_copy


@pytest.mark.parametrize(
  ("page", "dtype"),
  [
    ((1, 1, 8, 64), "bfloat16"),
    ((2, 1, 24, 8), "float32"),
    ((3, 3, 8, 128), "float16"),
    ((5, 1, 8, 256), "float32"),
  ],
)
def test_copies_pages_of_every_pool(page, dtype):
  rng = np.random.default_rng(0)
  pools = [rng.normal(size=(7, *page)).astype(jnp.dtype(dtype)) for _ in "kv"]
  # A page twice, the ends of the pool, and no page in four ways.
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


def test_no_copies_are_fine():
  pool = jnp.ones((3, 1, 8, 64))
  nothing = jnp.zeros(0, jnp.int32)
  (after,) = page_copy.copy_pages((pool,), nothing, nothing)
  assert (after == pool).all()


def test_says_which_pages_it_does_not_take():
  assert page_copy.unsupported((2, 1, 8, 128), "bfloat16") is None
  assert "rows of 4" in page_copy.unsupported((2, 1, 8, 4), "bfloat16")
  assert "rows of 512" in page_copy.unsupported((2, 1, 8, 512), "bfloat16")
