"""Ragged: cuts queries into tiles, and assigns them to programs.

A sequence's query tokens fall into tiles. An item is a tile for one KV head:

  tokens   |  seq 0           |seq 1|  seq 2                | padding  |
  tiles    | 0  | 1  | 2  | 3 | 0   | 0  | 1  | 2  | 3  | 4 | 0  | 1  |2|

Tokens of no sequence count as one more sequence, which has no keys: its output
of 0 is written like any other.

Tiles are sorted by cost, most expensive first, and assigned in snake order:

  programs    0  1  2  3  |  3  2  1  0  |  0  1  2  3
  items       0  1  2  3     4  5  6  7     8  9

Programs thus end at about the same time, and those that attend items of about
the same cost read the same keys at about the same time, from the L2 cache.

The list depends on lengths alone, so it is computed on the device, and once for
all layers of a step: their computations are equal, and XLA merges them. Which
sequences have unmapped pages is passed beside the list (`add_holes`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is static about a list."""

  num_tokens: int
  num_seqs: int
  num_kv_heads: int
  tile_tokens: int  # of a tile, at most
  causal: bool

  @property
  def num_tiles(self) -> int:
    """Tiles there may be: all but the last of a sequence are full."""
    num_tiles = self.num_tokens // self.tile_tokens + self.num_seqs + 1
    return min(num_tiles, self.num_tokens)


class QueryTile(NamedTuple):
  """Consecutive query tokens of one sequence. Or of all tiles, their arrays."""

  seq: jax.Array
  token: jax.Array  # its first
  num_tokens: jax.Array
  kv_len: jax.Array  # one past the last position that some query may see
  num_earlier: jax.Array  # positions by which the first query sees less
  num_new: jax.Array | None = None  # query tokens of the sequence, with a mask
  has_holes: jax.Array | None = None  # 1 if pages are unmapped, else 0


class TileList(NamedTuple):
  """All query tiles. Tiles that do not exist are empty, and come last."""

  num_items: Int[Array, "1"]
  tiles: Int[Array, "num_tiles fields"]  # the fields of `QueryTile`
  costs: Int[Array, " num_tiles"]


class Places(NamedTuple):
  """Where tokens are: i32[num_tokens] each."""

  tile: jax.Array  # in the list
  nth: jax.Array  # token of the tile


def list_tiles(
  sizes: Sizes,
  kv_lens: Int[Array, " num_seqs"],
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  cost: Callable[[jax.Array, jax.Array], jax.Array],
  tree_num_earlier: Int[Array, " num_seqs"] | None = None,
) -> tuple[TileList, Places]:
  """Lists the tiles, and says where their tokens are in the list.

  Args:
    sizes: The static facts.
    kv_lens: Tokens stored of each sequence.
    cu_q_lens: Their offsets on the token axis.
    num_active: Sequences from this one on have no queries.
    cost: Returns the cost of tiles from their `kv_len` and `num_earlier`.
    tree_num_earlier: `num_earlier` of sequences, if there is a tree mask.
  """
  tile_tokens, num_seqs = sizes.tile_tokens, sizes.num_seqs
  starts = jnp.clip(cu_q_lens, 0, sizes.num_tokens)
  num_active = jnp.clip(num_active, 0, num_seqs)
  # Of the sequences, and of the tokens of no sequence.
  seq = jnp.arange(num_seqs + 1, dtype=jnp.int32)
  start = jnp.where(seq < num_seqs, starts, starts[num_active])
  end = jnp.append(starts[1:], jnp.int32(sizes.num_tokens))
  has_queries = (seq < num_active) | (seq == num_seqs)
  q_len = jnp.where(has_queries, end - start, 0)
  kv_len = jnp.append(kv_lens, 0)
  num_tiles = lax.div(q_len + (tile_tokens - 1), jnp.int32(tile_tokens))
  # Sums over pairs are one kernel; a running sum would be a chain of them.
  upto = jnp.where(seq[None] <= seq[:, None], num_tiles[None], 0)
  ends = jnp.sum(upto, axis=1, dtype=jnp.int32)

  nth = jnp.arange(sizes.num_tiles, dtype=jnp.int32)
  at = jnp.sum(ends[None] <= nth[:, None], axis=1, dtype=jnp.int32)
  exists, at = at <= num_seqs, jnp.minimum(at, num_seqs)
  first = (nth - (ends - num_tiles)[at]) * tile_tokens
  num_tokens = jnp.minimum(q_len[at] - first, tile_tokens)
  seen, num_earlier, num_new = kv_len[at], jnp.zeros_like(num_tokens), None
  if tree_num_earlier is not None:
    num_earlier, num_new = jnp.append(tree_num_earlier, 0)[at], q_len[at]
  elif sizes.causal:
    seen, num_earlier = seen - (q_len[at] - first - num_tokens), num_tokens - 1
  tiles = QueryTile(
    seq=jnp.minimum(at, num_seqs - 1),
    token=start[at] + first,
    num_tokens=jnp.where(exists, num_tokens, 0),
    kv_len=jnp.where(at < num_seqs, seen, 0),
    num_earlier=num_earlier,
    num_new=num_new,
  )
  costs = jnp.where(exists, cost(tiles.kv_len, tiles.num_earlier), -1)
  rank = _rank(costs)
  fields = [x for x in tiles if x is not None]
  rows = jnp.stack([*fields, costs], axis=1)
  listed = jnp.zeros_like(rows).at[rank].set(rows, unique_indices=True)

  token = jnp.arange(sizes.num_tokens, dtype=jnp.int32)
  is_in = (start[None] <= token[:, None]) & (token[:, None] < end[None])
  of = lambda x: jnp.sum(jnp.where(is_in & has_queries[None], x[None], 0), 1)
  within = token - of(start)
  tile = of(ends - num_tiles) + lax.div(within, jnp.int32(tile_tokens))
  places = Places(rank[tile], lax.rem(within, jnp.int32(tile_tokens)))
  num_items = ends[-1:] * sizes.num_kv_heads
  return TileList(num_items, listed[:, :-1], listed[:, -1]), places


def _rank(costs: Int[Array, " n"]) -> Int[Array, " n"]:
  """Returns the place of each, most expensive first."""
  nth = jnp.arange(costs.shape[0], dtype=jnp.int32)
  higher = costs[None] > costs[:, None]
  same = (costs[None] == costs[:, None]) & (nth[None] < nth[:, None])
  return jnp.sum(higher | same, axis=1, dtype=jnp.int32)


def load(tiles_gmem, nth) -> QueryTile:
  """Loads the nth tile of the list, in a kernel.

  Args:
    tiles_gmem: See `TileList`.
    nth: Place of the tile in the list.
  """
  return QueryTile(*(tiles_gmem[nth, i] for i in range(tiles_gmem.shape[1])))


def add_holes(tile: QueryTile, holes_gmem) -> QueryTile:
  """Returns a tile that knows whether its sequence has unmapped pages.

  Args:
    tile: The tile.
    holes_gmem: i32[num_seqs], 1 for sequences with unmapped pages, else 0. It
      is not part of the list, which thereby depends on lengths alone.
  """
  return tile._replace(has_holes=holes_gmem[tile.seq])


def for_each_item[C](
  num_items_gmem,
  tiles_gmem,
  holes_gmem,
  num_kv_heads: int,
  num_programs: int,
  carry: C,
  step: Callable[[jax.Array, QueryTile, jax.Array, C], C],
) -> C:
  """Folds `step(place of the tile, tile, head, carry)` over whole items.

  In a kernel: those of a program.
  """
  num_items, program = num_items_gmem[0], lax.axis_index("program")

  def place(turn):
    return jnp.where(turn & 1 == 0, program, num_programs - 1 - program)

  def load_item(turn):
    item = jnp.minimum(turn * num_programs + place(turn), num_items - 1)
    nth, head = lax.div(item, num_kv_heads), lax.rem(item, num_kv_heads)
    return nth, load(tiles_gmem, nth), head

  # The next item is loaded while this one is attended. Its holes are loaded
  # later, since that load would be waited for here.
  def take(turn, state):
    (nth, tile, head), carry = state
    tile = add_holes(tile, holes_gmem)
    next_item = load_item(turn + 1)
    return next_item, step(nth, tile, head, carry)

  whole = lax.div(num_items, jnp.int32(num_programs))
  is_longer = place(whole) < num_items - whole * num_programs
  count = whole + is_longer.astype(jnp.int32)
  return lax.fori_loop(0, count, take, (load_item(0), carry))[1]
