"""Paged attention in plain JAX: every option, every device.

Streams over KV tiles with an online softmax (Milakov & Gimelshein, 2018), so no
intermediate array grows with the context. A KV tile is a few pages, gathered
through the page table. A query tile has query tokens of one sequence: one for
decode, up to 128 for prefill. It visits only the KV tiles that its sequence and
its window reach.

The data of quantised pages are exact in the dtype of the queries. Scales are
applied in float32: the scales of K to the scores, the scales of V to the
probabilities.

Masks are applied by selection, never by multiplication: the contents of unread
page tails, holes and other sequences' pages do not affect the output, even if
they are NaN.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from paged_jax.kv import quantised
from pallas_kernels.common.paged_kv import KVArrays, PagedKV
from pallas_kernels.common.rounding import cdiv, next_power_of_two
from pallas_kernels.common.spec import (
  MAX_SLOPE,
  AttentionArrays,
  AttentionSpec,
)

_DECODE_TILE = 128  # tokens of K and V per tile
_PREFILL_TILE = 256
_MAX_BLOCK_Q = 128  # tokens of a query tile
_QUERY_TILES_AT_ONCE = 8  # bounds the memory of scores


def paged_attention(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  kv: PagedKV,
  arrays: AttentionArrays,
  *,
  spec: AttentionSpec,
) -> tuple[Array, Array]:
  """Returns the output and LSE; see `paged_jax.paged_attention`."""
  queries = _Queries(
    q=q[:, None],
    seq_ids=jnp.arange(q.shape[0], dtype=jnp.int32),
    positions=kv.kv_lens[:, None] - 1,
    ends=kv.kv_lens[:, None],
    tree=None,
  )
  out, lse = _attend(queries, kv, arrays, spec, tile_tokens=_DECODE_TILE)
  return out[:, 0].astype(q.dtype), lse[:, 0]


def ragged_paged_attention(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  kv: PagedKV,
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  arrays: AttentionArrays,
  *,
  spec: AttentionSpec,
) -> tuple[Array, Array]:
  """Returns the output and LSE; see `paged_jax.ragged_paged_attention`."""
  num_tokens, num_q_heads, _ = q.shape
  num_seqs, kv_lens = kv.num_seqs, kv.kv_lens
  out = jnp.zeros_like(q)
  lse = jnp.full((num_tokens, num_q_heads), -jnp.inf, jnp.float32)
  if num_tokens == 0 or num_seqs == 0:
    return out, lse
  block_q = min(_MAX_BLOCK_Q, next_power_of_two(num_tokens))
  # Every query tile is full, except for the last one of each sequence.
  most = min(num_tokens, num_tokens // block_q + num_seqs)
  width = min(most, _QUERY_TILES_AT_ONCE)
  q_tiles = _QueryTiles(cu_q_lens, kv_lens, num_active, block_q)

  def run(i, carry):
    out, lse = carry
    index = i * width + jnp.arange(width, dtype=jnp.int32)
    seq_ids, tokens, positions = q_tiles.at(index)
    ends, tree = positions + 1, None
    if not spec.causal or arrays.tree_mask is not None:
      ends = jnp.where(tokens < num_tokens, kv_lens[seq_ids][:, None], 0)
    if arrays.tree_mask is not None:
      tree = _Tree(arrays.tree_mask, tokens, q_tiles.context[seq_ids])
      positions = tree.positions(q_tiles.q_lens[seq_ids])
    q_tile = q.at[tokens].get(mode="clip")
    queries = _Queries(q_tile, seq_ids, positions, ends, tree)
    tile_out, tile_lse = _attend(
      queries, kv, arrays, spec, tile_tokens=_PREFILL_TILE
    )
    out = out.at[tokens].set(tile_out.astype(q.dtype), mode="drop")
    return out, lse.at[tokens].set(tile_lse, mode="drop")

  return lax.fori_loop(0, (q_tiles.count + width - 1) // width, run, (out, lse))


class _QueryTiles:
  """The query tiles of a ragged batch, of at most `block_q` tokens each.

  Attributes:
    q_lens: i32[num_seqs], query tokens of each sequence.
    context: i32[num_seqs], tokens before the query tokens.
    count: i32[], number of query tiles.
  """

  def __init__(self, cu_q_lens, kv_lens, num_active, block_q):
    num_seqs = kv_lens.shape[0]
    active = jnp.arange(num_seqs, dtype=jnp.int32) < num_active
    self._block_q = block_q
    self._first_token = cu_q_lens[:-1]
    self.q_lens = jnp.where(active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    self.context = kv_lens - self.q_lens
    counts = (self.q_lens + block_q - 1) // block_q
    self._ends = jnp.cumsum(counts, dtype=jnp.int32)
    self._starts = self._ends - counts
    self.count = self._ends[-1]

  def at(self, index: Array) -> tuple[Array, Array, Array]:
    """Returns the sequences, tokens and positions of i32[width] query tiles.

    Tokens and positions are i32[width, block_q]. A query past the end of its
    tile is an out-of-range token at position -1, which sees no key.
    """
    seq = jnp.searchsorted(self._ends, index, side="right").astype(jnp.int32)
    exists = index < self.count
    seq = jnp.where(exists, seq, 0)
    within = jnp.arange(self._block_q, dtype=jnp.int32)[None]
    offset = (index - self._starts[seq])[:, None] * self._block_q + within
    valid = exists[:, None] & (offset < self.q_lens[seq][:, None])
    context = self.context[seq][:, None]
    token = self._first_token[seq][:, None] + offset
    return (
      seq,
      jnp.where(valid, token, jnp.iinfo(jnp.int32).max),
      jnp.where(valid, context + offset, -1),
    )


class _Tree(NamedTuple):
  """The tree mask, and where it applies to the query tiles."""

  mask: Array  # bool[num_tokens, max_new]
  tokens: Array  # i32[num_q_tiles, block_q]
  context: Array  # i32[num_q_tiles], position of the first new token

  def positions(self, q_lens: Array) -> Array:
    """Returns i32[num_q_tiles, block_q]: the context plus the depth."""
    column = jnp.arange(self.mask.shape[1], dtype=jnp.int32)
    rows = self.mask.at[self.tokens].get(mode="fill", fill_value=False)
    rows &= (column[None] < q_lens[:, None])[:, None]
    num_seen = rows.sum(-1, dtype=jnp.int32)
    return self.context[:, None] + num_seen - 1

  def select(self, visible: Array, key: Array, ends: Array) -> Array:
    """Returns `visible`, with the mask applied to the keys of new tokens.

    Args:
      visible: bool[num_q_tiles, block_q, pages_per_tile, page_size].
      key: i32[num_q_tiles, pages_per_tile, page_size], positions.
      ends: i32[num_q_tiles, block_q], see `_Queries`.
    """
    nth = key - self.context[:, None, None]
    # A negative column would count from the end.
    column = jnp.where(nth >= 0, nth, self.mask.shape[1])
    sees = self.mask.at[self.tokens[:, :, None, None], column[:, None]].get(
      mode="fill", fill_value=False
    )
    sees &= key[:, None] < ends[:, :, None, None]
    return jnp.where((nth >= 0)[:, None], sees, visible)


class _Queries(NamedTuple):
  """Query tiles; each has tokens of one sequence."""

  q: Array  # [num_q_tiles, block_q, num_q_heads, head_dim]
  seq_ids: Array  # i32[num_q_tiles], row of the page table
  positions: Array  # i32[num_q_tiles, block_q], where windows end
  ends: Array  # i32[num_q_tiles, block_q], end of the keys that a query may see
  tree: _Tree | None


class _Tile(NamedTuple):
  """A KV tile for each query tile."""

  rows: Array  # i32[num_q_tiles, pages_per_tile], rows of the flattened pool
  key: Array  # i32[num_q_tiles, pages_per_tile, page_size], positions
  visible: Array  # bool[num_q_tiles, block_q, pages_per_tile, page_size]
  # bool[num_q_tiles, pages_per_tile, 1, page_size], visible to any query.
  seen: Array


def _attend(
  queries: _Queries,
  kv: PagedKV,
  arrays: AttentionArrays,
  spec: AttentionSpec,
  *,
  tile_tokens: int,
) -> tuple[Array, Array]:
  """Returns f32[num_q_tiles, block_q, num_q_heads, head_dim] outputs, LSE."""
  num_q_tiles, block_q, num_q_heads, head_dim = queries.q.shape
  group = num_q_heads // kv.num_kv_heads
  pages_per_tile = max(1, tile_tokens // kv.page_size)
  pages_per_tile = min(pages_per_tile, kv.pages_per_seq)
  tiles = _Tiles(
    queries,
    pages_per_tile * kv.page_size,
    cdiv(kv.pages_per_seq, pages_per_tile),
    spec,
  )
  per_head = (1, kv.num_kv_heads, group)
  q = queries.q.reshape(num_q_tiles, block_q, *per_head[1:], head_dim)
  slopes = None
  if arrays.alibi_slopes is not None:
    slopes = arrays.alibi_slopes.astype(jnp.float32)
    slopes = jnp.clip(slopes, -MAX_SLOPE, MAX_SLOPE)
    slopes = slopes.reshape(*per_head, 1, 1, 1)
  k, v = kv.flat()
  # Probabilities times scales of V may exceed the range of float16.
  is_narrow = v.scales is None or q.dtype == jnp.bfloat16
  product_dtype = q.dtype if is_narrow else jnp.float32

  def fold(i, state):
    m, l, acc = state
    # 1. The pages of the tile, and their visible keys.
    tile = _tile(queries, kv, spec, tiles.at(i), pages_per_tile)
    # 2. Scores.
    s = _scores(q, k, tile, queries.positions, slopes, spec)
    # 3. Online softmax: rescale the state to the new maximum.
    m_next = jnp.maximum(m, s.max((-2, -1)))
    # Until a query has seen a key, exp(-inf - 0) keeps its state 0.
    shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
    alpha = jnp.exp(m - shift)
    p = jnp.exp(s - shift[..., None, None])
    # 4. P V.
    acc = acc * alpha[..., None] + _weigh_values(p, v, tile, product_dtype)
    return m_next, l * alpha + p.sum((-2, -1)), acc

  shape = (num_q_tiles, *per_head[1:], block_q)
  m, l, acc = lax.fori_loop(
    0,
    tiles.count,
    fold,
    (
      jnp.full(shape, -jnp.inf, jnp.float32),
      jnp.zeros(shape, jnp.float32),
      jnp.zeros((*shape, head_dim), jnp.float32),
    ),
  )
  sinks = arrays.sinks
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(*per_head, 1)
  out, lse = _finish(m, l, acc, sinks)
  out = jnp.moveaxis(out, 3, 1).reshape(queries.q.shape)
  return out, jnp.moveaxis(lse, 3, 1).reshape(num_q_tiles, block_q, num_q_heads)


def _tile(
  queries: _Queries,
  kv: PagedKV,
  spec: AttentionSpec,
  tile: Array,
  pages_per_tile: int,
) -> _Tile:
  """Returns a KV tile for each query tile.

  Args:
    queries: The queries.
    kv: The keys and values.
    spec: The static options.
    tile: i32[num_q_tiles], index of the tile.
    pages_per_tile: Number of pages of a tile.
  """
  column = tile[:, None] * pages_per_tile
  column += jnp.arange(pages_per_tile, dtype=jnp.int32)[None]
  page = kv.page_indices.at[queries.seq_ids[:, None], column].get(
    mode="fill", fill_value=kv.num_pages
  )
  key = column[:, :, None] * kv.page_size
  key += jnp.arange(kv.page_size, dtype=jnp.int32)[None, None]
  mapped = (page >= 0) & (page < kv.num_pages)
  visible = _visible(
    queries.positions[:, :, None, None],
    queries.ends[:, :, None, None],
    key[:, None],
    spec,
  )
  if queries.tree is not None:
    visible = queries.tree.select(visible, key, queries.ends)
  visible &= mapped[:, None, :, None]
  row = jnp.where(mapped, page, 0) * kv.num_layers
  if kv.layer is not None:
    row += kv.layer
  return _Tile(row, key, visible, visible.any(1)[:, :, None])


def _scores(q, k: KVArrays, tile: _Tile, positions, slopes, spec):
  """Returns f32[tiles, heads, group, block_q, pages, page_size], masked."""
  keys = _gather(k.pages, tile.rows).astype(q.dtype)
  s = spec.scale * jnp.einsum(
    "rqhgd,rphsd->rhgqps", q, keys, preferred_element_type=jnp.float32
  )
  if k.scales is not None:
    s *= _by_key(k.scales, tile)
  if (cap := spec.logits_soft_cap) is not None:
    s = cap * jnp.tanh(s / cap)
  if slopes is not None:
    distance = tile.key[:, None] - positions[:, :, None, None]
    s += slopes * distance[:, None, None].astype(jnp.float32)
  return jnp.where(tile.visible[:, None, None], s, -jnp.inf)


def _weigh_values(p, v: KVArrays, tile: _Tile, product_dtype):
  """Returns f32[tiles, heads, group, block_q, head_dim], P V of a KV tile."""
  values = _gather(v.pages, tile.rows).astype(product_dtype)
  # 0 * NaN is NaN, so values that no query of the tile sees are set to 0.
  values = jnp.where(tile.seen[..., None], values, 0)
  weights = p if v.scales is None else p * _by_key(v.scales, tile)
  return jnp.einsum(
    "rhgqps,rphsd->rhgqd",
    weights.astype(product_dtype),
    values,
    preferred_element_type=jnp.float32,
  )


def _gather(pages, rows):
  return quantised.move(lambda x, i: x.at[i].get(mode="clip"), pages, rows)


def _by_key(scales, tile: _Tile):
  """Gathers scales, 0 where not visible, as factors of [r, h, g, q, p, s]."""
  scales = jnp.where(tile.seen, _gather(scales, tile.rows), 0.0)
  return scales.swapaxes(1, 2)[:, :, None, None]


def _visible(pos, end, key, spec: AttentionSpec):
  """Returns whether a query at `pos` sees the key at `key`, if before `end`."""
  visible = key < end
  if (window := spec.sliding_window) is not None:
    visible &= (key > pos - window) | (key < spec.num_sink_tokens)
  return visible


class _Tiles:
  """The KV tiles that each query tile visits: sink tokens, then the window.

  Attributes:
    count: i32[], maximum number of KV tiles. A query tile sees no key in visits
      past its own last tile.
  """

  def __init__(
    self, queries: _Queries, tile: int, num_tiles: int, spec: AttentionSpec
  ):
    ends = queries.ends
    last = jnp.maximum(ends.max(1), 0) - 1
    # Exclusive end: 0 without keys, at most the tiles of the table.
    end = jnp.minimum(last // tile + 1, num_tiles)
    if (window := spec.sliding_window) is None:
      self._num_sink_tiles = 0
      self._first = jnp.zeros_like(end)
    else:
      self._num_sink_tiles = cdiv(spec.num_sink_tokens, tile)
      earliest = jnp.where(ends <= 0, last[:, None], queries.positions).min(1)
      first = earliest - (window - 1)
      if queries.tree is not None:  # windows do not bound new tokens
        first = jnp.minimum(first, queries.tree.context)
      first = jnp.maximum(first, 0) // tile
      self._first = jnp.maximum(first, self._num_sink_tiles)
    sink_tiles = jnp.minimum(end, self._num_sink_tiles)
    count = sink_tiles + jnp.maximum(end - self._first, 0)
    self.count = jnp.max(count, initial=0)

  def at(self, i: Array | int) -> Array:
    """Returns i32[num_q_tiles], the i-th KV tile of each query tile."""
    return jnp.where(
      i < self._num_sink_tiles, i, self._first + (i - self._num_sink_tiles)
    )


def _finish(m, l, acc, sinks):
  """Normalises the softmax state; `sinks` are added to the denominator only."""
  empty = m == -jnp.inf
  lse = m + jnp.log(jnp.where(empty, 1.0, l))  # -inf without keys
  total = lse if sinks is None else jnp.logaddexp(lse, sinks)
  total = jnp.where(empty, 0.0, total)
  weight = jnp.exp(jnp.where(empty, 0.0, m) - total)
  out = jnp.where(empty[..., None], 0.0, acc * weight[..., None])
  return out, jnp.where(empty, -jnp.inf, total)
