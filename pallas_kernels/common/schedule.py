"""Deals the KV tiles of a ragged batch to programs, an equal share to each.

The tiles of all (sequence, KV head) pairs, the items, lie one after the other
on a line, and program p of P attends the p-th of P shares of it:

  items      |   seq 0, head 0  |   seq 0, head 1  |s1 h0|s1 h1| seq 2 ...
  programs   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9 ...

Only items that cross an end of a share leave partial results: at most two a
program, those of its first and of its last item.

Where items are cut then depends on all of them. In fixed splits, an item is
cut by its own length alone, into at most `MAX_SPLITS` parts; shares begin where
a part does, and every part of an item that has several is a partial result.

The line depends on lengths, so it is laid out on the device, and once for all
layers of a step: they ask for the same, and the compiler computes it once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

MAX_SPLITS = 16  # of an item: for a sequence alone to occupy the device
LEAST_SPLIT = 4  # tiles


def split_size(num_tiles):
  """Returns the tiles of a part of an item, in fixed splits."""
  parts = lax.div(num_tiles + (MAX_SPLITS - 1), jnp.int32(MAX_SPLITS))
  return jnp.maximum(parts, LEAST_SPLIT)


@dataclasses.dataclass(frozen=True)
class Line:
  """Where on the line the shares of programs begin, without fixed splits.

  Shares differ by one tile at most. To leave an eighth of the line to small
  programs, which start wherever a large one ended early, gained 0.4 % and cost
  more in partials (H200): equal shares it is, although some multiprocessors
  read a third faster than others.
  """

  num_tiles: ArrayLike  # of all items
  num_programs: int

  def start(self, program):
    """Returns the first tile of a program's share, `num_tiles` past the last.

    Args:
      program: i32, at most the number of programs.
    """
    return program * self._least + jnp.minimum(program, self._longer)

  def program_of(self, tile):
    """Returns the program that attends a tile."""
    longer = self._longer * (self._least + 1)
    return jnp.where(
      tile < longer,
      lax.div(tile, self._least + 1),
      self._longer + lax.div(tile - longer, jnp.maximum(self._least, 1)),
    )

  @property
  def _least(self):
    return lax.div(jnp.asarray(self.num_tiles), jnp.int32(self.num_programs))

  @property
  def _longer(self):  # shares that have one tile more
    return lax.rem(jnp.asarray(self.num_tiles), jnp.int32(self.num_programs))


class Plan(NamedTuple):
  """What programs read of the schedule."""

  starts: Int[Array, " num_seqs+1"]  # tiles of one KV head before a sequence
  # Columns: the first tile on the line, its sequence, its KV head, its place in
  # the item, the tiles of the item. The last row is past the end.
  firsts: Int[Array, "num_programs+1 5"]


def deal(
  num_tiles: Int[Array, " num_seqs"],
  num_kv_heads: int,
  num_programs: int,
  *,
  fixed_splits: bool = False,
) -> Plan:
  """Lays out the line.

  Args:
    num_tiles: tiles of each sequence, for one KV head; at least 1.
    num_kv_heads: KV heads.
    num_programs: programs that share the tiles.
    fixed_splits: whether items are cut by their own length.
  """
  num_seqs = num_tiles.shape[0]
  # Sums over pairs are one kernel; a running sum would be a chain of them.
  row = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 0)
  column = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 1)
  before = jnp.where(column < row, num_tiles[None], 0)
  starts = jnp.sum(before, axis=1, dtype=jnp.int32)
  line = Line(starts[-1] * num_kv_heads, num_programs)
  firsts = line.start(jnp.arange(num_programs + 1, dtype=jnp.int32))
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


class Piece(NamedTuple):
  """A part of an item that lies in the share of a program."""

  seq: jax.Array
  head: jax.Array
  nth: jax.Array  # piece of the program
  first: jax.Array  # tile of the item
  num_tiles: jax.Array
  is_whole: jax.Array  # the item
  split: jax.Array  # part of the item, in fixed splits


def for_each_piece[C](
  plan: Plan,
  num_kv_heads: int,
  carry: C,
  step: Callable[[Piece, C], C],
  *,
  fixed_splits: bool = False,
) -> C:
  """Folds `step(piece, carry)` over the pieces of a program, in a kernel.

  Args:
    plan: the plan, in memory of the GPU.
    num_kv_heads: as in `deal`.
    carry: what is folded.
    step: the function.
    fixed_splits: as in `deal`.
  """
  starts_gmem, firsts_gmem = plan
  last_seq = starts_gmem.shape[0] - 2
  program = lax.axis_index("program")
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  seq, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))

  def attend(state):
    begin, seq, head, tile, tiles, nth, carry = state
    num_tiles, split = jnp.minimum(tiles - tile, end - begin), jnp.int32(0)
    if fixed_splits:
      size = split_size(tiles)
      num_tiles, split = jnp.minimum(num_tiles, size), lax.div(tile, size)
    is_whole = num_tiles == tiles
    piece = Piece(seq, head, nth, tile, num_tiles, is_whole, split)
    carry = step(piece, carry)
    next_tile = tile + num_tiles
    goes_on = next_tile < tiles  # in the next piece, or in the next share
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
