import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import split_kv


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize(
  ("sliding_window", "num_sink_tokens"),
  [(None, 0), (1, 0), (100, 0), (100, 5), (64, 64), (10, 300), (1000, 1)],
)
def test_splits_visit_each_seen_position_once(
  num_splits, sliding_window, num_sink_tokens
):
  block_kv, capacity = 64, 640
  most = split_kv.max_tiles(capacity, block_kv, sliding_window, num_sink_tokens)

  @jax.jit
  def visit(split, kv_len, i):
    share = split_kv.share_of(
      split,
      kv_len,
      num_splits=num_splits,
      capacity=capacity,
      block_kv=block_kv,
      sliding_window=sliding_window,
      num_sink_tokens=num_sink_tokens,
    )
    base = share.base(i)
    positions = base + jnp.arange(block_kv)
    sees = share.sees(positions)
    return share.num_tiles, positions, sees, share.sees_all(base)

  for kv_len in (-1, 0, 1, 64, 65, 128, 333, 639, 640, 1000):
    visits, tiles = np.zeros(capacity, int), 0
    for split in range(num_splits):
      for i in itertools.count():
        num_tiles, positions, sees, sees_all = visit(split, kv_len, i)
        if i >= num_tiles:
          break
        tiles += 1
        visits[np.asarray(positions)[np.asarray(sees)]] += 1
        assert not sees_all or sees.all()
    position = np.arange(capacity)
    seen = position < kv_len
    if sliding_window is not None:
      in_window = position > kv_len - 1 - sliding_window
      seen &= in_window | (position < num_sink_tokens)
    np.testing.assert_array_equal(visits, seen)
    assert tiles <= most


def test_shares_of_a_sequence_differ_by_one_tile_at_most():
  for num_splits, kv_len in itertools.product((1, 2, 3, 7), (0, 64, 500, 640)):
    shares = [
      split_kv.share_of(
        split,
        kv_len,
        num_splits=num_splits,
        capacity=640,
        block_kv=64,
        sliding_window=None,
        num_sink_tokens=0,
      )
      for split in range(num_splits)
    ]
    counts = [int(share.num_tiles) for share in shares]
    assert sum(counts) == -(-kv_len // 64)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("with_sinks", [False, True])
def test_merge_equals_one_softmax(with_sinks):
  rng = np.random.default_rng(0)
  scores = rng.standard_normal((2, 3, 4, 5))  # seqs, splits, heads, keys
  values = rng.standard_normal((2, 3, 4, 5, 8))
  scores[0, 1] = scores[1] = -np.inf  # an empty split, an empty sequence
  weights = np.exp(scores)
  sums = weights.sum(-1)
  partials = np.einsum("bshk,bshkd->bshd", weights, values)
  partials = partials / np.where(sums > 0, sums, 1)[..., None]
  with np.errstate(divide="ignore"):
    lses = np.log2(sums)
  sinks = rng.standard_normal(4)
  out, lse = split_kv.merge(
    jnp.asarray(partials, jnp.float32),
    jnp.asarray(lses, jnp.float32),
    jnp.asarray(sinks, jnp.float32) if with_sinks else None,
  )
  total = sums[0].sum(0) + (np.exp(sinks) if with_sinks else 0)
  expected = np.einsum("shk,shkd->hd", weights[0], values[0]) / total[:, None]
  np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-6)
  np.testing.assert_allclose(lse[0], np.log(total), rtol=0, atol=1e-6)
  assert not out[1].any()
  assert np.isneginf(lse[1]).all()


def test_num_splits_fills_the_device_but_leaves_two_tiles_a_split():
  assert split_kv.num_splits(512, 1000, 132) == 1
  assert split_kv.num_splits(8, 1000, 132) == 32
  assert split_kv.num_splits(8, 10, 132) == 5
  assert split_kv.num_splits(8, 0, 132) == 1
