"""Deals the KV tiles of a ragged batch to programs, an equal share to each.

The tiles of all (sequence, KV head) pairs, the items, lie one after the other
on a line, and program p of P attends the p-th of P shares of it:

  items      |   seq 0, head 0  |   seq 0, head 1  |s1 h0|s1 h1| seq 2 ...
  programs   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9 ...

Only items that cross an end of a share leave partial results: at most two a
program, those of its first and of its last item.

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


@dataclasses.dataclass(frozen=True)
class Line:
  """Where on the line the shares of programs begin.

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
) -> Plan:
  """Lays out the line.

  Args:
    num_tiles: tiles of each sequence, for one KV head; at least 1.
    num_kv_heads: KV heads.
    num_programs: programs that share the tiles.
  """
  num_seqs = num_tiles.shape[0]
  # Sums over pairs are one kernel; a running sum would be a chain of them.
  row = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 0)
  column = lax.broadcasted_iota(jnp.int32, (num_seqs + 1, num_seqs), 1)
  before = jnp.where(column < row, num_tiles[None], 0)
  starts = jnp.sum(before, axis=1, dtype=jnp.int32)
  line = Line(starts[-1] * num_kv_heads, num_programs)
  programs = jnp.arange(num_programs + 1, dtype=jnp.int32)
  first = line.start(programs)
  passed = starts[None, 1:] * num_kv_heads <= first[:, None]
  seq = jnp.minimum(jnp.sum(passed, axis=1, dtype=jnp.int32), num_seqs - 1)
  start = jnp.max(jnp.where(passed, starts[None, 1:], 0), axis=1)
  end = jnp.min(jnp.where(passed, starts[-1], starts[None, 1:]), axis=1)
  tiles = jnp.maximum(end - start, 1)
  place = first - start * num_kv_heads
  head, tile = lax.div(place, tiles), lax.rem(place, tiles)
  return Plan(starts, jnp.stack([first, seq, head, tile, tiles], axis=1))


class Piece(NamedTuple):
  """The part of an item that lies in the share of a program."""

  seq: jax.Array
  head: jax.Array
  nth: jax.Array  # piece of the program
  first: jax.Array  # tile of the item
  num_tiles: jax.Array
  is_whole: jax.Array  # the item


def for_each_piece[C](
  plan: Plan, num_kv_heads: int, carry: C, step: Callable[[Piece, C], C]
) -> C:
  """Folds `step(piece, carry)` over the pieces of a program, in a kernel.

  Args:
    plan: the plan, in memory of the GPU.
    num_kv_heads: as in `deal`.
    carry: what is folded.
    step: the function.
  """
  starts_gmem, firsts_gmem = plan
  last_seq = starts_gmem.shape[0] - 2
  program = lax.axis_index("program")
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  seq, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))

  def attend(state):
    begin, seq, head, tile, tiles, nth, carry = state
    num_tiles = jnp.minimum(tiles - tile, end - begin)
    is_whole = num_tiles == tiles
    carry = step(Piece(seq, head, nth, tile, num_tiles, is_whole), carry)
    is_last_head = head == num_kv_heads - 1
    next_seq = jnp.where(is_last_head, seq + 1, seq)
    at = jnp.minimum(next_seq, last_seq)
    return (
      begin + num_tiles,
      next_seq,
      jnp.where(is_last_head, 0, head + 1),
      jnp.int32(0),
      starts_gmem[at + 1] - starts_gmem[at],
      nth + 1,
      carry,
    )

  state = begin, seq, head, tile, tiles, jnp.int32(0), carry
  return lax.while_loop(lambda state: state[0] < end, attend, state)[-1]
