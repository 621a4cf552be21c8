"""Cuts a ragged batch into items: tiles of query tokens, a KV head each.

A sequence's query tokens fall into tiles of `tile_tokens`. An item is a tile
for one KV head:

  tokens   |  seq 0           |seq 1|  seq 2                |  nobody's  |
  tiles    | 0  | 1  | 2  | 3 | 0   | 0  | 1  | 2  | 3  | 4 | 0  | 1  |2|

Tokens of no sequence are one more sequence, which has no keys: its output of 0
is written like any other.

Items are listed sequence by sequence, those with most keys first, then KV head
by KV head, so that the items that run at the same time read the same keys; and
from the last tile to the first, which has the fewest keys, so that programs end
at about the same time. Program p takes every `num_programs`-th item.

The list depends on lengths, so it is made on the device, and once for all
layers of a step: they ask for the same, and the compiler computes it once.
"""

import dataclasses
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
  tile_tokens: int  # of an item, at most
  causal: bool

  @property
  def num_items(self) -> int:
    """Items there may be: every tile but the last of a sequence is full."""
    num_tiles = self.num_tokens // self.tile_tokens + self.num_seqs + 1
    return min(num_tiles, self.num_tokens) * self.num_kv_heads


class Item(NamedTuple):
  """A tile of query tokens of one sequence, for one KV head."""

  seq: jax.Array
  head: jax.Array
  token: jax.Array  # its first
  num_tokens: jax.Array
  kv_len: jax.Array  # one past the last position that some query may see
  num_earlier: jax.Array  # positions by which the first query sees less
  has_holes: jax.Array  # whether the sequence has unmapped pages


class Plan(NamedTuple):
  """The list of items; its fields are arrays of all of them."""

  num_items: Int[Array, "1"]
  items: Int[Array, "num_items 7"]


class Seqs(NamedTuple):
  """Sequences in the order of their items: i32[num_seqs + 1] each."""

  seq: jax.Array
  token: jax.Array  # the first
  q_len: jax.Array
  kv_len: jax.Array
  has_holes: jax.Array
  num_tiles: jax.Array
  start: jax.Array  # items before it, for one KV head


def plan(sizes: Sizes, seqs: Seqs) -> Plan:
  """Lists the items."""
  ends = (seqs.start + seqs.num_tiles) * sizes.num_kv_heads
  item = jnp.arange(sizes.num_items, dtype=jnp.int32)
  passed = jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32)
  at = Seqs(*(x[jnp.minimum(passed, sizes.num_seqs)] for x in seqs))
  num_tiles = jnp.maximum(at.num_tiles, 1)
  place = item - at.start * sizes.num_kv_heads
  head = lax.div(place, num_tiles)
  first = (num_tiles - 1 - lax.rem(place, num_tiles)) * sizes.tile_tokens
  num_tokens = jnp.minimum(at.q_len - first, sizes.tile_tokens)
  kv_len, num_earlier = at.kv_len, jnp.zeros_like(num_tokens)
  if sizes.causal:
    kv_len = kv_len - at.q_len + first + num_tokens
    num_earlier = num_tokens - 1
  is_anybody = at.seq < sizes.num_seqs
  items = Item(
    seq=jnp.minimum(at.seq, sizes.num_seqs - 1),
    head=head,
    token=at.token + first,
    num_tokens=num_tokens,
    kv_len=jnp.where(is_anybody, kv_len, 0),
    num_earlier=num_earlier,
    has_holes=at.has_holes,
  )
  return Plan(ends[-1:], jnp.stack(items, axis=1))


def order(
  sizes: Sizes,
  kv_lens: Int[Array, " num_seqs"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""],
  has_holes: Int[Array, " num_seqs"],
) -> Seqs:
  """Returns the sequences, those with most keys first, and nobody's last.

  Args:
    sizes: what is static.
    kv_lens: tokens stored of each sequence.
    cu_q_lens: their offsets on the token axis.
    num_active: sequences from this one on have no queries.
    has_holes: whether a sequence has unmapped pages, 0 or 1.
  """
  num_seqs = sizes.num_seqs
  seq = jnp.arange(num_seqs + 1, dtype=jnp.int32)
  num_active = jnp.clip(num_active, 0, num_seqs)
  starts = jnp.clip(cu_q_lens, 0, sizes.num_tokens)
  rest = starts[num_active]
  token = jnp.where(seq < num_seqs, starts, rest)
  ends = jnp.append(starts[1:], jnp.int32(sizes.num_tokens))
  q_len = jnp.where((seq < num_active) | (seq == num_seqs), ends - token, 0)
  kv_len = jnp.append(kv_lens, jnp.int32(-1))
  # Sums over pairs are one kernel, which a sort is not.
  cost = jnp.where(seq < num_seqs, jnp.maximum(kv_len, 0), -1)
  more, same = cost[None] > cost[:, None], cost[None] == cost[:, None]
  ahead = more | (same & (seq[None] < seq[:, None]))
  rank = jnp.sum(ahead, axis=1, dtype=jnp.int32)
  is_nth = rank[None] == seq[:, None]
  nth = lambda x: jnp.sum(jnp.where(is_nth, x[None], 0), axis=1)
  has_holes = jnp.append(has_holes, jnp.int32(0))
  fields = [nth(x) for x in (seq, token, q_len, kv_len, has_holes)]
  num_tiles = lax.div(fields[2] + (sizes.tile_tokens - 1), sizes.tile_tokens)
  before = jnp.where(seq[None] < seq[:, None], num_tiles[None], 0)
  start = jnp.sum(before, axis=1, dtype=jnp.int32)
  return Seqs(*fields, num_tiles, start)


class Places(NamedTuple):
  """Where tokens are: i32[num_tokens] each."""

  item: jax.Array  # for KV head 0
  items_per_head: jax.Array  # from it to the item for the next KV head
  nth: jax.Array  # token of the item


def places(sizes: Sizes, seqs: Seqs) -> Places:
  """Returns where each token is."""
  token = jnp.arange(sizes.num_tokens, dtype=jnp.int32)
  first, after = seqs.token, seqs.token + seqs.q_len
  is_in = (first[None] <= token[:, None]) & (token[:, None] < after[None])
  of = lambda x: jnp.sum(jnp.where(is_in, x[None], 0), axis=1)
  within, num_tiles = token - of(first), of(seqs.num_tiles)
  tile = num_tiles - 1 - lax.div(within, sizes.tile_tokens)
  item = of(seqs.start) * sizes.num_kv_heads + tile
  return Places(item, num_tiles, lax.rem(within, sizes.tile_tokens))
