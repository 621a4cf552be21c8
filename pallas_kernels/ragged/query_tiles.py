"""Ragged: cuts queries into tiles, and assigns them to programs.

The query tokens of each sequence are cut into tiles. A work item is a tile for
one KV head:

  tokens   |  seq 0           |seq 1|  seq 2                | padding  |
  tiles    | 0  | 1  | 2  | 3 | 0   | 0  | 1  | 2  | 3  | 4 | 0  | 1  |2|

Padding tokens, which belong to no sequence, are treated as one more sequence
without keys, so that their output of 0 is written like any other.

Tiles are sorted by cost, most expensive first, and assigned in snake order:

  programs    0  1  2  3  |  3  2  1  0  |  0  1  2  3
  items       0  1  2  3     4  5  6  7     8  9

Programs therefore end at about the same time. Concurrent items have similar
costs, so they often read the same keys, which then come from the L2 cache.

The list depends on the lengths alone. It is computed on the device, once per
step: the layers of a step compute equal lists, and XLA merges them. Whether a
sequence has unmapped pages is not part of the list (`add_holes`).
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
  """The static sizes of a list of query tiles."""

  num_tokens: int
  num_seqs: int
  num_kv_heads: int
  tile_tokens: int  # tokens per query tile, at most
  causal: bool

  @property
  def num_tiles(self) -> int:
    """Tiles, at most: in each sequence, all but the last tile are full."""
    num_tiles = self.num_tokens // self.tile_tokens + self.num_seqs + 1
    return min(num_tiles, self.num_tokens)


class QueryTile(NamedTuple):
  """Consecutive query tokens of one sequence; or arrays of these, per tile."""

  seq: jax.Array
  token: jax.Array  # index of the first token on the token axis
  num_tokens: jax.Array
  kv_len: jax.Array  # one past the last position that a query of the tile sees
  num_earlier: jax.Array  # see `kv_tiles.visit`
  num_new: jax.Array | None = (
    None  # with a tree mask: the sequence's new tokens
  )
  has_holes: jax.Array | None = None  # see `add_holes`


class TileList(NamedTuple):
  """All query tiles, most expensive first; unused entries come last."""

  num_items: Int[Array, "1"]
  tiles: Int[Array, "num_tiles fields"]  # the fields of `QueryTile`
  costs: Int[Array, " num_tiles"]


class Places(NamedTuple):
  """The place of each token in the list of query tiles."""

  tile: jax.Array  # i32[num_tokens], index of its tile in the list
  nth: jax.Array  # i32[num_tokens], index of the token in its tile


def list_tiles(
  sizes: Sizes,
  kv_lens: Int[Array, " num_seqs"],
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  cost: Callable[[jax.Array, jax.Array], jax.Array],
  tree_num_earlier: Int[Array, " num_seqs"] | None = None,
) -> tuple[TileList, Places]:
  """Returns the list of query tiles, and the place of each token in it.

  Args:
    sizes: The static sizes.
    kv_lens: Stored tokens of each sequence.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this index on have no queries.
    cost: Returns the costs of tiles from their `kv_len` and `num_earlier`.
    tree_num_earlier: `num_earlier` of each sequence; None without a tree mask.
  """
  # 1. The query tokens of each sequence, with the padding as one more sequence.
  tile_tokens, num_seqs = sizes.tile_tokens, sizes.num_seqs
  starts = jnp.clip(cu_q_lens, 0, sizes.num_tokens)
  num_active = jnp.clip(num_active, 0, num_seqs)
  seq = jnp.arange(num_seqs + 1, dtype=jnp.int32)
  start = jnp.where(seq < num_seqs, starts, starts[num_active])
  end = jnp.append(starts[1:], jnp.int32(sizes.num_tokens))
  has_queries = (seq < num_active) | (seq == num_seqs)
  q_len = jnp.where(has_queries, end - start, 0)
  kv_len = jnp.append(kv_lens, 0)
  num_tiles = lax.div(q_len + (tile_tokens - 1), jnp.int32(tile_tokens))
  # A masked sum over pairs is one fused kernel; a cumulative sum is several.
  upto = jnp.where(seq[None] <= seq[:, None], num_tiles[None], 0)
  ends = jnp.sum(upto, axis=1, dtype=jnp.int32)

  # 2. The tiles, in the order of the token axis.
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

  # 3. Sort them by cost, most expensive first.
  costs = jnp.where(exists, cost(tiles.kv_len, tiles.num_earlier), -1)
  rank = _rank(costs)
  fields = [x for x in tiles if x is not None]
  rows = jnp.stack([*fields, costs], axis=1)
  listed = jnp.zeros_like(rows).at[rank].set(rows, unique_indices=True)

  # 4. The place of each token, from its sequence.
  token = jnp.arange(sizes.num_tokens, dtype=jnp.int32)
  is_in = (start[None] <= token[:, None]) & (token[:, None] < end[None])
  of_token = lambda x: jnp.sum(
    jnp.where(is_in & has_queries[None], x[None], 0), 1
  )
  within = token - of_token(start)
  tile = of_token(ends - num_tiles) + lax.div(within, jnp.int32(tile_tokens))
  places = Places(rank[tile], lax.rem(within, jnp.int32(tile_tokens)))
  num_items = ends[-1:] * sizes.num_kv_heads
  return TileList(num_items, listed[:, :-1], listed[:, -1]), places


def _rank(costs: Int[Array, " n"]) -> Int[Array, " n"]:
  """Returns the rank of each cost, the highest first; ties keep their order."""
  nth = jnp.arange(costs.shape[0], dtype=jnp.int32)
  higher = costs[None] > costs[:, None]
  same = (costs[None] == costs[:, None]) & (nth[None] < nth[:, None])
  return jnp.sum(higher | same, axis=1, dtype=jnp.int32)


def load(tiles_gmem, nth) -> QueryTile:
  """Loads a query tile in a kernel.

  Args:
    tiles_gmem: `TileList.tiles`, in global memory.
    nth: Index of the tile in the list.
  """
  return QueryTile(*(tiles_gmem[nth, i] for i in range(tiles_gmem.shape[1])))


def add_holes(tile: QueryTile, holes_gmem) -> QueryTile:
  """Returns the tile with `has_holes`.

  Args:
    tile: The tile.
    holes_gmem: i32[num_seqs], 1 where a query may see an unmapped page, else 0.
      It is not part of the list, which therefore depends on lengths alone.
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
  """Folds `step(nth, tile, head, carry)` over the items of the calling program.

  `nth` is the index of the query tile in the list.

  Args:
    num_items_gmem: `TileList.num_items`, in global memory.
    tiles_gmem: `TileList.tiles`, in global memory.
    holes_gmem: See `add_holes`.
    num_kv_heads: Number of KV heads.
    num_programs: Number of programs (CTAs).
    carry: The initial carry.
    step: Returns the next carry.

  Returns:
    The last carry.
  """
  num_items, program = num_items_gmem[0], lax.axis_index("program")

  def index_in_round(turn):
    return jnp.where(turn & 1 == 0, program, num_programs - 1 - program)

  def load_item(turn):
    item = jnp.minimum(
      turn * num_programs + index_in_round(turn), num_items - 1
    )
    nth, head = lax.div(item, num_kv_heads), lax.rem(item, num_kv_heads)
    return nth, load(tiles_gmem, nth), head

  # Load the next item first: its latency overlaps with the current item. Its
  # holes depend on that load, and would wait for it here.
  def body(turn, state):
    (nth, tile, head), carry = state
    tile = add_holes(tile, holes_gmem)
    next_item = load_item(turn + 1)
    return next_item, step(nth, tile, head, carry)

  whole = lax.div(num_items, jnp.int32(num_programs))
  is_longer = index_in_round(whole) < num_items - whole * num_programs
  count = whole + is_longer.astype(jnp.int32)
  return lax.fori_loop(0, count, body, (load_item(0), carry))[1]
