"""Splits the KV tiles of a ragged batch evenly between programs.

The tiles of all (sequence, KV head) pairs, the items, lie one after the other
on a line, and program p of P attends the p-th of P shares of it:

  items      |   seq 0, head 0  |   seq 0, head 1  |s1 h0|s1 h1| seq 2 ...
  programs   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9 ...

Only items that cross an end of a share leave partial results: at most two a
program, those of its first and of its last item.

Where items are split then depends on all of them. With fixed splits, an item is
split by its own length alone, into at most `MAX_SPLITS` splits; shares begin
where a split does, and every split of an item that has several is a partial
result.

The schedule depends on lengths alone, so it is computed on the device, and once
for all layers of a step: their computations are equal, and XLA merges them.
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

MAX_SPLITS = 16  # of an item: for a sequence alone to occupy the device
LEAST_SPLIT = 4  # tiles
FIRST, LAST = 0, 1  # which of a program's items a partial result is of


def split_size(num_tiles):
  """Returns the tiles of a split of an item, with fixed splits."""
  size = lax.div(num_tiles + (MAX_SPLITS - 1), jnp.int32(MAX_SPLITS))
  return jnp.maximum(size, LEAST_SPLIT)


@dataclasses.dataclass(frozen=True)
class TileRanges:
  """Where on the line the shares of programs begin, without fixed splits.

  Shares differ by one tile at most. Leaving an eighth of the line to small
  programs, which start wherever a large one ended early, gained 0.4 % and cost
  more in partials (H200). Shares are therefore equal, although some
  multiprocessors read a third faster than others.
  """

  num_tiles: ArrayLike  # of all items
  num_programs: int

  def start(self, program):
    """Returns the first tile of a program's share, `num_tiles` past the last.

    Args:
      program: i32, at most the number of programs.
    """
    return program * self._min_size + jnp.minimum(program, self._num_longer)

  def program_of(self, tile):
    """Returns the program that attends a tile."""
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
  def _num_longer(self):  # shares that have one tile more
    return lax.rem(jnp.asarray(self.num_tiles), jnp.int32(self.num_programs))


class Plan(NamedTuple):
  """The schedule, as programs read it."""

  starts: (
    ArrayOrRef  # i32[num_seqs + 1], tiles of one KV head before a sequence
  )
  # i32[num_programs + 1, 5]: the first tile on the line, its sequence, its KV
  # head, its place in the item, the tiles of the item. The last row is past the
  # end.
  firsts: ArrayOrRef


def split_evenly(
  num_tiles: Int[Array, " num_seqs"],
  num_kv_heads: int,
  num_programs: int,
  *,
  fixed_splits: bool = False,
) -> Plan:
  """Returns the schedule.

  Args:
    num_tiles: Tiles of each sequence, for one KV head; at least 1.
    num_kv_heads: KV heads.
    num_programs: Programs that share the tiles.
    fixed_splits: Whether items are split by their own length.
  """
  num_seqs = num_tiles.shape[0]
  # Sums over pairs are one kernel; a running sum would be a chain of them.
  row = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 0)
  column = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 1)
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
  return Plan(starts, jnp.stack(at, axis=1))


def _find(starts, num_kv_heads, first):
  """Returns the columns of `Plan.firsts` for tiles of the line."""
  last_seq = starts.shape[0] - 2
  passed = starts[None, 1:] * num_kv_heads <= first[:, None]
  seq = jnp.minimum(jnp.sum(passed, axis=1, dtype=jnp.int32), last_seq)
  start = jnp.max(jnp.where(passed, starts[None, 1:], 0), axis=1)
  end = jnp.min(jnp.where(passed, starts[-1], starts[None, 1:]), axis=1)
  tiles = jnp.maximum(end - start, 1)
  place = first - start * num_kv_heads
  return first, seq, lax.div(place, tiles), lax.rem(place, tiles), tiles


class Split(NamedTuple):
  """A part of an item that lies in the share of a program."""

  seq: jax.Array
  head: jax.Array
  nth: jax.Array  # number of the split in the program
  first: jax.Array  # tile of the item
  num_tiles: jax.Array
  is_whole: jax.Array  # whether it is the whole item
  nth_of_item: jax.Array  # number of the split in the item, if splits are fixed


def for_each_split[C](
  plan: Plan,
  num_kv_heads: int,
  carry: C,
  step: Callable[[Split, C], C],
  *,
  fixed_splits: bool = False,
) -> C:
  """Folds `step(split, carry)` over the splits of a program, in a kernel.

  Args:
    plan: The schedule, in global memory.
    num_kv_heads: As in `split_evenly`.
    carry: The initial carry.
    step: Returns the next carry.
    fixed_splits: As in `split_evenly`.
  """
  starts_gmem, firsts_gmem = plan
  last_seq = starts_gmem.shape[0] - 2
  program = lax.axis_index("program")
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  seq, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))

  def attend(state):
    begin, seq, head, tile, tiles, nth, carry = state
    num_tiles, of_item = jnp.minimum(tiles - tile, end - begin), jnp.int32(0)
    if fixed_splits:
      size = split_size(tiles)
      num_tiles, of_item = jnp.minimum(num_tiles, size), lax.div(tile, size)
    is_whole = num_tiles == tiles
    split = Split(seq, head, nth, tile, num_tiles, is_whole, of_item)
    carry = step(split, carry)
    next_tile = tile + num_tiles
    goes_on = next_tile < tiles  # in the next split, or in the next share
    is_last_head = jnp.logical_not(goes_on) & (head == num_kv_heads - 1)
    next_head = jnp.where(goes_on, head, head + 1)
    next_seq = jnp.where(is_last_head, seq + 1, seq)
    at = jnp.minimum(next_seq, last_seq)
    return (
      begin + num_tiles,
      next_seq,
      jnp.where(is_last_head, 0, next_head),
      jnp.where(goes_on, next_tile, 0),
      starts_gmem[at + 1] - starts_gmem[at],
      nth + 1,
      carry,
    )

  state = begin, seq, head, tile, tiles, jnp.int32(0), carry
  return lax.while_loop(lambda state: state[0] < end, attend, state)[-1]
