"""Splits the KV tiles of a ragged batch evenly between programs.

A work item is a pair of a row and a KV head; a row is a sequence in decode and
a query tile in ragged. The tiles of all items are numbered consecutively, and
program p of P attends the p-th of P contiguous ranges of equal size. A split is
the part of an item that lies in one range:

  items      |   row 0, head 0  |   row 0, head 1  |r1 h0|r1 h1| row 2 ...
  programs   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9 ...

Only items that cross the boundary of a range produce partial results. Each
program writes at most two: of its first and of its last item.

These boundaries depend on the whole batch. With fixed splits (batch invariance)
they do not: an item is cut by its own length alone, into at most `MAX_SPLITS`
splits, and each range begins at the beginning of a split. Then every split of
an item that has several writes a partial result.

The schedule depends on the lengths alone. It is computed on the device, once
per step: the layers of a step compute equal schedules, and XLA merges them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from pallas_kernels.common.types import ArrayOrRef

MAX_SPLITS = 16  # per item, so that a single sequence can occupy the device
LEAST_SPLIT = 4  # tiles per split, at least
FIRST, LAST = 0, 1  # a partial result of the program's first or last item


def split_size(num_tiles):
  """Returns the number of tiles per split, with fixed splits.

  Args:
    num_tiles: i32, tiles of the item. The last split may be shorter.
  """
  size = lax.div(num_tiles + (MAX_SPLITS - 1), jnp.int32(MAX_SPLITS))
  return jnp.maximum(size, LEAST_SPLIT)


@dataclasses.dataclass(frozen=True)
class TileRanges:
  """The contiguous tile ranges of the programs, without fixed splits.

  Range sizes differ by at most one tile, although some multiprocessors read a
  third faster than others. Leaving an eighth of the tiles to small programs,
  which start wherever a large one ends early, gained 0.4 % and cost more than
  that in partials (H200).
  """

  num_tiles: ArrayLike  # tiles of all items
  num_programs: int

  def start(self, program):
    """Returns the first tile of a program's range.

    Args:
      program: i32 in [0, num_programs]; `num_programs` gives `num_tiles`.
    """
    return program * self._min_size + jnp.minimum(program, self._num_longer)

  def program_of(self, tile):
    """Returns the program whose range contains a tile.

    Args:
      tile: i32 in [0, num_tiles).
    """
    longer = self._num_longer * (self._min_size + 1)
    return jnp.where(
      tile < longer,
      lax.div(tile, self._min_size + 1),
      self._num_longer + lax.div(tile - longer, jnp.maximum(self._min_size, 1)),
    )

  @property
  def _min_size(self):
    return lax.div(jnp.asarray(self.num_tiles), jnp.int32(self.num_programs))

  @property
  def _num_longer(self):  # ranges of `_min_size + 1` tiles; they come first
    return lax.rem(jnp.asarray(self.num_tiles), jnp.int32(self.num_programs))


class Splits(NamedTuple):
  """The schedule that programs read from global memory."""

  # i32[num_rows + 1]: tiles, for one KV head, of all rows before this one.
  starts: ArrayOrRef
  # i32[num_programs + 1, 5], for the first tile of each range: its number among
  # all tiles, its row, its KV head, its index in the item, the number of tiles
  # in the item. The last entry is the end of the last range.
  firsts: ArrayOrRef


def split_evenly(
  num_tiles: Int[Array, " num_rows"],
  num_kv_heads: int,
  num_programs: int,
  *,
  fixed_splits: bool = False,
) -> Splits:
  """Returns the schedule.

  Args:
    num_tiles: Tiles of each row, for one KV head; at least 1.
    num_kv_heads: Number of KV heads.
    num_programs: Number of programs (CTAs).
    fixed_splits: Whether items are split by their own length alone.
  """
  num_rows = num_tiles.shape[0]
  # A masked sum over pairs is one fused kernel; a cumulative sum is several.
  row = lax.broadcasted_iota(jnp.int32, (num_rows + 1, num_rows), 0)
  column = lax.broadcasted_iota(jnp.int32, (num_rows + 1, num_rows), 1)
  before = jnp.where(column < row, num_tiles[None], 0)
  starts = jnp.sum(before, axis=1, dtype=jnp.int32)
  ranges = TileRanges(starts[-1] * num_kv_heads, num_programs)
  firsts = ranges.start(jnp.arange(num_programs + 1, dtype=jnp.int32))
  at = _find(starts, num_kv_heads, firsts)
  if fixed_splits:
    tile, tiles = at[3], at[4]
    size = split_size(tiles)
    whole = lax.div(tile + size - 1, size) * size
    firsts += jnp.minimum(whole, tiles) - tile
    at = _find(starts, num_kv_heads, firsts)
  return Splits(starts, jnp.stack(at, axis=1))


def _find(starts, num_kv_heads, first):
  """Returns the columns of `Splits.firsts`, given numbers of tiles."""
  last_row = starts.shape[0] - 2
  passed = starts[None, 1:] * num_kv_heads <= first[:, None]
  row = jnp.minimum(jnp.sum(passed, axis=1, dtype=jnp.int32), last_row)
  start = jnp.max(jnp.where(passed, starts[None, 1:], 0), axis=1)
  end = jnp.min(jnp.where(passed, starts[-1], starts[None, 1:]), axis=1)
  tiles = jnp.maximum(end - start, 1)
  tile_in_row = first - start * num_kv_heads
  head, tile_in_item = lax.div(tile_in_row, tiles), lax.rem(tile_in_row, tiles)
  return first, row, head, tile_in_item, tiles


class Split(NamedTuple):
  """The part of an item that lies in the range of one program."""

  row: jax.Array  # a sequence in decode, a query tile in ragged
  head: jax.Array
  nth: jax.Array  # index of the split in the program
  first: jax.Array  # index of its first tile in the item
  num_tiles: jax.Array
  is_whole: jax.Array  # whether the split is the whole item
  nth_of_item: jax.Array  # index of the split in the item, with fixed splits


def for_each_split[C](
  splits: Splits,
  num_kv_heads: int,
  carry: C,
  step: Callable[[Split, C], C],
  *,
  fixed_splits: bool = False,
) -> C:
  """Folds `step(split, carry)` over the splits of the calling program.

  Args:
    splits: The schedule, in global memory.
    num_kv_heads: See `split_evenly`.
    carry: The initial carry.
    step: Returns the next carry.
    fixed_splits: See `split_evenly`.

  Returns:
    The last carry.
  """
  starts_gmem, firsts_gmem = splits
  last_row = starts_gmem.shape[0] - 2
  program = lax.axis_index("program")
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  row, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))

  # The state is the position of the next split, from `begin` up to `end`.
  def body(state):
    begin, row, head, tile, tiles, nth, carry = state
    num_tiles, of_item = jnp.minimum(tiles - tile, end - begin), jnp.int32(0)
    if fixed_splits:
      size = split_size(tiles)
      num_tiles, of_item = jnp.minimum(num_tiles, size), lax.div(tile, size)
    is_whole = num_tiles == tiles
    # 1. Attend up to the end of the item, of the range or of a fixed split.
    split = Split(row, head, nth, tile, num_tiles, is_whole, of_item)
    carry = step(split, carry)
    next_tile = tile + num_tiles
    # 2. Go on in the same item, the next KV head or the next row.
    item_continues = next_tile < tiles
    is_last_head = jnp.logical_not(item_continues) & (head == num_kv_heads - 1)
    next_head = jnp.where(item_continues, head, head + 1)
    next_row = jnp.where(is_last_head, row + 1, row)
    at = jnp.minimum(next_row, last_row)
    return (
      begin + num_tiles,
      next_row,
      jnp.where(is_last_head, 0, next_head),
      jnp.where(item_continues, next_tile, 0),
      starts_gmem[at + 1] - starts_gmem[at],
      nth + 1,
      carry,
    )

  state = begin, row, head, tile, tiles, jnp.int32(0), carry
  return lax.while_loop(lambda state: state[0] < end, body, state)[-1]
