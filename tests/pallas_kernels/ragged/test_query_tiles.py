"""Query tiles, compared with the tokens that they should hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged import query_tiles
from pallas_kernels.ragged.query_tiles import QueryTile, Sizes

NUM_TOKENS, TILE_TOKENS = 40, 8


def _plan(q_lens, kv_lens, num_active, *, causal=True):
  sizes = Sizes(
    num_tokens=NUM_TOKENS,
    num_seqs=len(q_lens),
    num_kv_heads=2,
    tile_tokens=TILE_TOKENS,
    causal=causal,
  )
  cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  plan, places = jax.jit(
    lambda *args: query_tiles.list_tiles(sizes, *args, lambda n, _: n)
  )(i32(kv_lens), i32(cu_q_lens), i32(num_active))
  num_tiles = int(plan.num_items[0]) // 2
  assert num_tiles <= sizes.num_tiles
  tiles = np.asarray(plan.tiles)
  assert not tiles[num_tiles:, QueryTile._fields.index("num_tokens")].any()
  listed = [QueryTile(*row) for row in tiles[:num_tiles]]
  return listed, np.asarray(plan.costs), *map(np.asarray, places)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  ("q_lens", "kv_lens", "num_active"),
  [
    ([40], [40], 1),
    ([9, 0, 8, 23], [9, 4, 100, 23], 4),
    ([9, 0, 8, 1], [50, 4, 100, 1], 4),
    ([9, 7, 8, 3], [9, 20, 100, 3], 2),
    ([0, 0], [0, 3], 2),
    ([1] * 40, list(range(40)), 40),
  ],
)
def test_tiles_hold_each_token_once(q_lens, kv_lens, num_active, causal):
  tiles, costs, tile_of, nth_of = _plan(
    q_lens, kv_lens, num_active, causal=causal
  )
  starts = np.concatenate([[0], np.cumsum(q_lens)])
  seen = np.zeros(NUM_TOKENS, int)
  for i, tile in enumerate(tiles):
    assert 1 <= tile.num_tokens <= TILE_TOKENS
    assert costs[i] == tile.kv_len
    for nth in range(tile.num_tokens):
      token = tile.token + nth
      seen[token] += 1
      assert (tile_of[token], nth_of[token]) == (i, nth)
      if token >= starts[num_active]:
        assert tile.kv_len == 0
        continue
      assert starts[tile.seq] <= token < starts[tile.seq + 1]
      position = kv_lens[tile.seq] - starts[tile.seq + 1] + token
      last = position + 1 if causal else kv_lens[tile.seq]
      assert tile.kv_len - causal * (tile.num_tokens - 1 - nth) == last
    assert tile.num_earlier == causal * (tile.num_tokens - 1)
  np.testing.assert_array_equal(seen, 1)


def test_the_tiles_that_cost_most_come_first():
  tiles, costs, *_ = _plan([9, 8, 23], [9, 100, 60], 3)
  assert (np.diff(costs) <= 0).all()
  assert [tile.seq for tile in tiles] == [1, 2, 2, 2, 0, 0]
