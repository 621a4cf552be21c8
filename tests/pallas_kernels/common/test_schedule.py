"""The split of tiles over programs, compared with plain lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import schedule
from pallas_kernels.common.schedule import TileRanges


def _list_tiles(num_tiles, num_kv_heads):
  """Returns (sequence, KV head, index in item, tiles of item) for each tile."""
  return [
    (seq, head, index, num_item_tiles)
    for seq, num_item_tiles in enumerate(num_tiles)
    for head in range(num_kv_heads)
    for index in range(num_item_tiles)
  ]


@pytest.mark.parametrize("num_programs", [1, 2, 7, 40])
def test_ranges_cover_every_tile_once_and_evenly(num_programs):
  most = 100
  traces = []

  @jax.jit
  def split(num_tiles):
    traces.append(num_tiles)
    ranges = TileRanges(num_tiles, num_programs)
    programs = jnp.arange(num_programs + 1, dtype=jnp.int32)
    tiles = jnp.arange(most, dtype=jnp.int32)
    return ranges.start(programs), ranges.program_of(tiles)

  for num_tiles in range(most + 1):
    starts, program_of = map(np.asarray, split(np.int32(num_tiles)))
    sizes = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == num_tiles
    assert set(sizes) <= {num_tiles // num_programs, sizes[0]}
    assert 0 <= sizes[0] - sizes[-1] <= 1
    owners = np.repeat(np.arange(num_programs), sizes)
    np.testing.assert_array_equal(program_of[:num_tiles], owners)
  assert len(traces) == 1


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("num_programs", [1, 5, 64])
def test_splits_have_the_first_tile_of_each_program(num_kv_heads, num_programs):
  num_seqs = 6
  traces = []

  @jax.jit
  def split(num_tiles):
    traces.append(num_tiles)
    return schedule.split_evenly(num_tiles, num_kv_heads, num_programs)

  rng = np.random.default_rng(0)
  most = rng.choice([1, 2, 9, 60], 40)
  batches = [rng.integers(1, n, num_seqs, endpoint=True) for n in most]
  batches += [[1, 1, 1, 1, 1, 90], [90, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5]]
  for num_tiles in batches:
    num_tiles = np.asarray(num_tiles, np.int32)
    splits = split(num_tiles)
    tiles = _list_tiles(num_tiles, num_kv_heads)
    assert splits.starts.tolist() == [0, *np.cumsum(num_tiles)]
    firsts = np.asarray(splits.firsts)
    sizes = [len(x) for x in np.array_split(tiles, num_programs)]
    assert firsts[:, 0].tolist() == [0, *np.cumsum(sizes)]
    assert firsts[-1, 0] == len(tiles)
    for first, *rest in firsts:
      assert first == len(tiles) or tuple(rest) == tiles[first]
  assert len(traces) == 1


def test_one_sequence_fills_all_programs():
  # 6, 6, 5 and 5 tiles.
  splits = schedule.split_evenly(jnp.asarray([11], jnp.int32), 2, 4)
  assert splits.firsts[:-1].tolist() == [
    [0, 0, 0, 0, 11],
    [6, 0, 0, 6, 11],
    [12, 0, 1, 1, 11],
    [17, 0, 1, 6, 11],
  ]


@pytest.mark.parametrize("num_programs", [1, 5, 64])
def test_fixed_splits_cut_an_item_by_its_own_length(num_programs):
  @jax.jit
  def split(num_tiles):
    return schedule.split_evenly(num_tiles, 3, num_programs, fixed_splits=True)

  rng = np.random.default_rng(0)
  for most in (1, 4, 5, 63, 64, 65, 2000):
    num_tiles = rng.integers(1, most, 6, endpoint=True)
    tiles = _list_tiles(num_tiles, 3)
    starts = np.asarray(split(jnp.asarray(num_tiles, jnp.int32)).firsts)[:, 0]
    assert starts[0] == 0
    assert starts[-1] == len(tiles)
    split_sizes = [max(4, -(-num // 16)) for _, _, _, num in tiles]
    for start in starts[:-1]:
      assert start == len(tiles) or tiles[start][2] % split_sizes[start] == 0
    sizes = np.diff(starts)
    assert (sizes >= 0).all()
    assert sizes.max() <= -(-len(tiles) // num_programs) + max(split_sizes) - 1
