"""Paged attention in plain JAX: every option, every device.

Streams over tiles of keys with an online softmax: no array that it makes grows
with the context. A tile is a few pages, gathered by the page table. Rows of
work are blocks of query tokens of one sequence: one token for decode, up to
128 for prefill; sequences that are shorter, or windowed, skip the tiles that
none of their queries sees.

The narrow numbers of quantised pages are exact in the dtype of the queries.
Their scales join in float32: those of K the scores, those of V the softmax.

Masking selects, it never multiplies: what lies in unread page tails, holes and
other sequences' pages leaves no trace, not even NaN.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from paged_jax.kv import quantised
from paged_jax.ops.options import ArrayOptions, Options

_DECODE_TILE = 128  # tokens of K and V in flight for each row
_PREFILL_TILE = 256
_MAX_BLOCK_Q = 128
_BLOCKS_PER_WAVE = 8
_STEEPEST = 2.0**95  # times any distance between positions is a number


def paged_attention(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  arrays: ArrayOptions,
  *,
  options: Options,
) -> tuple[Array, Array]:
  """Returns output and LSE; see `paged_jax.paged_attention`."""
  out, lse = _attend(
    q[:, None],
    k_pages,
    v_pages,
    page_indices,
    jnp.arange(q.shape[0], dtype=jnp.int32),
    kv_lens[:, None] - 1,
    kv_lens[:, None],
    arrays,
    options,
    tree=None,
    tile_tokens=_DECODE_TILE,
  )
  return out[:, 0].astype(q.dtype), lse[:, 0]


def ragged_paged_attention(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""],
  tree_mask: Bool[Array, "num_tokens max_new"] | None,
  arrays: ArrayOptions,
  *,
  options: Options,
) -> tuple[Array, Array]:
  """Returns output and LSE; see `paged_jax.ragged_paged_attention`."""
  num_tokens, num_q_heads, head_dim = q.shape
  num_seqs = kv_lens.shape[0]
  out = jnp.zeros_like(q)
  lse = jnp.full((num_tokens, num_q_heads), -jnp.inf, jnp.float32)
  if num_tokens == 0 or num_seqs == 0:
    return out, lse
  block_q = min(_MAX_BLOCK_Q, 1 << (num_tokens - 1).bit_length())
  # Every block but the last of its sequence is full.
  most = min(num_tokens, num_tokens // block_q + num_seqs)
  wave = min(most, _BLOCKS_PER_WAVE)
  blocks = _QueryBlocks(cu_q_lens, kv_lens, num_active, block_q)

  def run_wave(i, carry):
    out, lse = carry
    block = i * wave + jnp.arange(wave, dtype=jnp.int32)
    seq_ids, tokens, positions = blocks.at(block)
    ends, tree = positions + 1, None
    if not options.causal or tree_mask is not None:
      ends = jnp.where(tokens < num_tokens, kv_lens[seq_ids][:, None], 0)
    if tree_mask is not None:
      tree = _Tree(tree_mask, tokens, blocks.context[seq_ids])
      positions = tree.positions(blocks.q_lens[seq_ids])
    block_out, block_lse = _attend(
      q.at[tokens].get(mode="clip"),
      k_pages,
      v_pages,
      page_indices,
      seq_ids,
      positions,
      ends,
      arrays,
      options,
      tree=tree,
      tile_tokens=_PREFILL_TILE,
    )
    out = out.at[tokens].set(block_out.astype(q.dtype), mode="drop")
    return out, lse.at[tokens].set(block_lse, mode="drop")

  return lax.fori_loop(
    0, (blocks.count + wave - 1) // wave, run_wave, (out, lse)
  )


class _QueryBlocks:
  """The queries of a ragged batch, cut into blocks of one sequence each.

  Attributes:
    q_lens: i32[num_seqs], query tokens of each sequence.
    context: i32[num_seqs], tokens before them.
    count: i32[], blocks.
  """

  def __init__(self, cu_q_lens, kv_lens, num_active, block_q):
    num_seqs = kv_lens.shape[0]
    active = jnp.arange(num_seqs, dtype=jnp.int32) < num_active
    self._block_q = block_q
    self._first_token = cu_q_lens[:-1]
    self.q_lens = jnp.where(active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    self.context = kv_lens - self.q_lens
    blocks = (self.q_lens + block_q - 1) // block_q
    self._ends = jnp.cumsum(blocks, dtype=jnp.int32)
    self._starts = self._ends - blocks
    self.count = self._ends[-1]

  def at(self, block: Array) -> tuple[Array, Array, Array]:
    """Returns rows, tokens and positions of i32[wave] blocks.

    Tokens and positions are i32[wave, block_q]; a query that does not exist is
    an out-of-range token at position -1, which sees no key.
    """
    seq = jnp.searchsorted(self._ends, block, side="right").astype(jnp.int32)
    exists = block < self.count
    seq = jnp.where(exists, seq, 0)
    within = jnp.arange(self._block_q, dtype=jnp.int32)[None]
    offset = (block - self._starts[seq])[:, None] * self._block_q + within
    valid = exists[:, None] & (offset < self.q_lens[seq][:, None])
    context = self.context[seq][:, None]
    token = self._first_token[seq][:, None] + offset
    return (
      seq,
      jnp.where(valid, token, jnp.iinfo(jnp.int32).max),
      jnp.where(valid, context + offset, -1),
    )


class _Tree(NamedTuple):
  """What the queries of blocks see of the new tokens of their sequences."""

  mask: Array  # bool[num_tokens, max_new]
  tokens: Array  # i32[num_rows, block_q]
  context: Array  # i32[num_rows], position of the first new token

  def positions(self, q_lens: Array) -> Array:
    """Returns i32[num_rows, block_q]: depths below the context."""
    column = jnp.arange(self.mask.shape[1], dtype=jnp.int32)
    rows = self.mask.at[self.tokens].get(mode="fill", fill_value=False)
    rows &= (column[None] < q_lens[:, None])[:, None]
    num_seen = rows.sum(-1, dtype=jnp.int32)
    return self.context[:, None] + num_seen - 1

  def select(self, visible: Array, key: Array, ends: Array) -> Array:
    """Returns what is visible, where new tokens are as the mask says.

    Args:
      visible: bool[num_rows, block_q, pages_per_tile, page_size].
      key: i32[num_rows, pages_per_tile, page_size], positions.
      ends: i32[num_rows, block_q], see `_attend`.
    """
    nth = key - self.context[:, None, None]
    # Never negative: that would count from the end.
    column = jnp.where(nth >= 0, nth, self.mask.shape[1])
    sees = self.mask.at[self.tokens[:, :, None, None], column[:, None]].get(
      mode="fill", fill_value=False
    )
    sees &= key[:, None] < ends[:, :, None, None]
    return jnp.where((nth >= 0)[:, None], sees, visible)


def _attend(
  q,  # [num_rows, block_q, num_q_heads, head_dim]
  k_pages,
  v_pages,
  page_indices,
  seq_ids,  # i32[num_rows], row of page_indices
  positions,  # i32[num_rows, block_q], to which a window belongs
  ends,  # i32[num_rows, block_q]; a query sees no key from there on
  arrays: ArrayOptions,
  options: Options,
  *,
  tree: _Tree | None,
  tile_tokens: int,
):
  """Returns f32 output [rows, block_q, heads, head_dim] and LSE."""
  num_rows, block_q, num_q_heads, head_dim = q.shape
  num_pages, num_kv_heads, page_size, _ = k_pages.shape
  group = num_q_heads // num_kv_heads
  pages_per_tile = max(1, tile_tokens // page_size)
  pages_per_tile = min(pages_per_tile, page_indices.shape[1])
  tiles = _Tiles(
    positions,
    ends,
    None if tree is None else tree.context,
    pages_per_tile * page_size,
    -(-page_indices.shape[1] // pages_per_tile),
    options,
  )
  k_scales, v_scales, sinks, alibi_slopes = arrays
  q = q.reshape(num_rows, block_q, num_kv_heads, group, head_dim)
  # Probabilities times scales of V can lie outside of what float16 holds.
  narrow = v_scales is None or q.dtype == jnp.bfloat16
  product_dtype = q.dtype if narrow else jnp.float32
  slopes = None
  if alibi_slopes is not None:
    slopes = alibi_slopes.astype(jnp.float32)
    slopes = jnp.clip(slopes, -_STEEPEST, _STEEPEST)
    slopes = slopes.reshape(1, num_kv_heads, group, 1, 1, 1)

  def fold(i, state):
    m, l, acc = state
    column = tiles.at(i)[:, None] * pages_per_tile
    column += jnp.arange(pages_per_tile, dtype=jnp.int32)[None]
    page = page_indices.at[seq_ids[:, None], column].get(
      mode="fill", fill_value=num_pages
    )
    key = column[:, :, None] * page_size
    key += jnp.arange(page_size, dtype=jnp.int32)[None, None]
    mapped = (page >= 0) & (page < num_pages)
    visible = _visible(
      positions[:, :, None, None],
      ends[:, :, None, None],
      key[:, None],
      options,
    )  # [num_rows, block_q, pages_per_tile, page_size]
    if tree is not None:
      visible = tree.select(visible, key, ends)
    visible &= mapped[:, None, :, None]
    # 0 * NaN is NaN: V that no query of the block sees is selected away.
    seen = visible.any(1)[:, :, None]
    page = jnp.where(mapped, page, 0)
    k = _gather(k_pages, page).astype(q.dtype)
    v = _gather(v_pages, page).astype(product_dtype)
    v = jnp.where(seen[..., None], v, 0)
    s = options.scale * jnp.einsum(
      "rqhgd,rphsd->rhgqps", q, k, preferred_element_type=jnp.float32
    )
    if k_scales is not None:
      s *= _by_key(k_scales, page, seen)
    if (cap := options.logits_soft_cap) is not None:
      s = cap * jnp.tanh(s / cap)
    if slopes is not None:
      distance = key[:, None] - positions[:, :, None, None]
      s += slopes * distance[:, None, None].astype(jnp.float32)
    s = jnp.where(visible[:, None, None], s, -jnp.inf)
    m_next = jnp.maximum(m, s.max((-2, -1)))
    # Of a row that has seen no key yet, exp(-inf - 0) keeps everything 0.
    shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
    alpha = jnp.exp(m - shift)
    p = jnp.exp(s - shift[..., None, None])
    weights = p if v_scales is None else p * _by_key(v_scales, page, seen)
    acc = acc * alpha[..., None] + jnp.einsum(
      "rhgqps,rphsd->rhgqd",
      weights.astype(product_dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    return m_next, l * alpha + p.sum((-2, -1)), acc

  shape = (num_rows, num_kv_heads, group, block_q)
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
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(1, num_kv_heads, group, 1)
  out, lse = _finish(m, l, acc, sinks)
  out = jnp.moveaxis(out, 3, 1).reshape(
    num_rows, block_q, num_q_heads, head_dim
  )
  return out, jnp.moveaxis(lse, 3, 1).reshape(num_rows, block_q, num_q_heads)


def _gather(pages, page):
  return quantised.move(lambda x, i: x.at[i].get(mode="clip"), pages, page)


def _by_key(scales, page, seen):
  """Gathers scales, 0 where not `seen`, as factors of [r, h, g, q, p, s]."""
  scales = jnp.where(seen, _gather(scales, page), 0.0)
  return scales.swapaxes(1, 2)[:, :, None, None]


def _visible(pos, end, key, options):
  """Whether a query at `pos` sees the key at position `key`, before `end`."""
  visible = key < end
  if (window := options.sliding_window) is not None:
    visible &= (key > pos - window) | (key < options.num_sink_tokens)
  return visible


class _Tiles:
  """Which tiles of keys each row visits: its sink tokens', then its window's.

  Attributes:
    count: i32[], tiles of the row that has most. Visits of a row past its own
      last tile see no key.
  """

  def __init__(self, positions, ends, context, tile, num_tiles, options):
    last = jnp.maximum(ends.max(1), 0) - 1
    # Exclusive; 0 for a row that sees nothing; no more than the table has.
    end = jnp.minimum(last // tile + 1, num_tiles)
    if (window := options.sliding_window) is None:
      self._num_sink_tiles = 0
      self._first = jnp.zeros_like(end)
    else:
      self._num_sink_tiles = (options.num_sink_tokens + tile - 1) // tile
      earliest = jnp.where(ends <= 0, last[:, None], positions).min(1)
      first = earliest - (window - 1)
      if context is not None:  # windows do not bound new tokens
        first = jnp.minimum(first, context)
      first = jnp.maximum(first, 0) // tile
      self._first = jnp.maximum(first, self._num_sink_tiles)
    sink_tiles = jnp.minimum(end, self._num_sink_tiles)
    count = sink_tiles + jnp.maximum(end - self._first, 0)
    self.count = jnp.max(count, initial=0)

  def at(self, i: Array | int) -> Array:
    """Returns i32[num_rows], the i-th tile of each row."""
    return jnp.where(
      i < self._num_sink_tiles, i, self._first + (i - self._num_sink_tiles)
    )


def _finish(m, l, acc, sinks):
  """Normalises the softmax state; `sinks` join the denominator only."""
  empty = m == -jnp.inf
  lse = m + jnp.log(jnp.where(empty, 1.0, l))  # -inf of an empty row stays
  total = lse if sinks is None else jnp.logaddexp(lse, sinks)
  total = jnp.where(empty, 0.0, total)
  weight = jnp.exp(jnp.where(empty, 0.0, m) - total)
  out = jnp.where(empty[..., None], 0.0, acc * weight[..., None])
  return out, jnp.where(empty, -jnp.inf, total)
