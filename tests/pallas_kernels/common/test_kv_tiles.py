"""Visited tiles and visible keys, compared with a mask of all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import kv_tiles

BLOCK_KV, CAPACITY = 64, 640
KV_LENS = (-1, 0, 1, 64, 65, 128, 333, 639, 640, 1000)


def _seen(kv_len, sliding_window, num_sink_tokens):
  """Returns the mask of positions that the last query sees."""
  position = np.arange(CAPACITY)
  seen = position < kv_len
  if sliding_window is not None:
    in_window = position > kv_len - 1 - sliding_window
    seen &= in_window | (position < num_sink_tokens)
  return seen


@pytest.mark.parametrize("num_earlier", [0, 3])
@pytest.mark.parametrize(
  ("sliding_window", "num_sink_tokens"),
  [(None, 0), (1, 0), (100, 0), (100, 5), (64, 64), (10, 300), (1000, 1)],
)
def test_tiles_visit_each_seen_position_once(
  sliding_window, num_sink_tokens, num_earlier
):
  queries = range(num_earlier + 1)  # tokens before the last

  @jax.jit
  def visit(kv_len):
    tiles = kv_tiles.visit(
      kv_len,
      jnp.int32(num_earlier),
      capacity=CAPACITY,
      block_kv=BLOCK_KV,
      sliding_window=sliding_window,
      num_sink_tokens=num_sink_tokens,
    )
    base = tiles.base(jnp.arange(CAPACITY // BLOCK_KV, dtype=jnp.int32))
    positions = base[:, None] + jnp.arange(BLOCK_KV, dtype=jnp.int32)[None]
    sees = jnp.stack([tiles.sees(positions, before) for before in queries])
    seen = tiles.are_seen(positions)
    return tiles.num_visited, positions, sees, seen, tiles.sees_all(base)

  for kv_len in KV_LENS:
    num_visited, *tiles = map(np.asarray, visit(jnp.int32(kv_len)))
    expected = np.stack(
      [_seen(kv_len - i, sliding_window, num_sink_tokens) for i in queries]
    )
    by_some = expected.any(0)
    # Each visited tile has a key that some query sees.
    assert num_visited == by_some.reshape(-1, BLOCK_KV).any(1).sum()
    visits = np.zeros(CAPACITY, int)
    positions, sees, seen, sees_all = tiles
    for i in range(num_visited):
      at = positions[i]
      np.testing.assert_array_equal(sees[:, i], expected[:, at])
      np.testing.assert_array_equal(seen[i], by_some[at])
      assert not sees_all[i] or expected[:, at].all()
      assert sliding_window or sees_all[i] == expected[:, at].all()
      visits[at[seen[i]]] += 1
    np.testing.assert_array_equal(visits, by_some)


@pytest.mark.parametrize(
  ("sliding_window", "num_sink_tokens"),
  [(None, 0), (1, 0), (100, 0), (100, 5), (4, 300)],
)
@pytest.mark.parametrize("num_new", [1, 5, 70])
def test_tiles_visit_what_queries_with_a_mask_see(
  sliding_window, num_sink_tokens, num_new
):
  num_seen = np.array([0, 1, num_new])  # new tokens that each query sees
  fewest = 0 if sliding_window is None else min(num_seen[0], sliding_window)
  sees_new = np.random.default_rng(0).random((3, CAPACITY)) < 0.5
  sees_new[:, ::3] = False

  @jax.jit
  def visit(kv_len):
    tiles = kv_tiles.visit(
      kv_len,
      jnp.int32(num_new - fewest),
      jnp.int32(num_new),
      capacity=CAPACITY,
      block_kv=BLOCK_KV,
      sliding_window=sliding_window,
      num_sink_tokens=num_sink_tokens,
    )
    base = tiles.base(jnp.arange(CAPACITY // BLOCK_KV, dtype=jnp.int32))
    positions = base[:, None] + jnp.arange(BLOCK_KV, dtype=jnp.int32)[None]
    mask = jnp.asarray(sees_new)[:, positions.clip(0, CAPACITY - 1)]
    sees = jnp.stack(
      [
        tiles.sees(positions, num_new - seen, mask[i])
        for i, seen in enumerate(num_seen)
      ]
    )
    seen = tiles.are_seen(positions, mask.any(0))
    return tiles.num_visited, positions, sees, seen, tiles.sees_all(base)

  for kv_len in KV_LENS:
    num_visited, positions, sees, seen, sees_all = map(
      np.asarray, visit(jnp.int32(kv_len))
    )
    context, position = kv_len - num_new, np.arange(CAPACITY)
    expected = np.stack(
      [
        np.where(
          position < context,
          _seen(context + n, sliding_window, num_sink_tokens),
          sees_new[i] & (position < kv_len),
        )
        for i, n in enumerate(num_seen)
      ]
    )
    visits = np.zeros(CAPACITY, int)
    for i in range(num_visited):
      at = positions[i]
      np.testing.assert_array_equal(sees[:, i], expected[:, at])
      np.testing.assert_array_equal(seen[i], expected[:, at].any(0))
      assert not sees_all[i] or expected[:, at].all()
      assert not sees_all[i] or at[-1] < context
      visits[at[seen[i]]] += 1
    np.testing.assert_array_equal(visits, expected.any(0))
