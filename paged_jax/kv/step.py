"""The tokens of one model step: where each of them lives.

A step reserves pages for all its rows at once, outside the layers, and computes
the position and the slot of each of its tokens. Every layer then writes its
keys and values there and attends through the page table.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged_jax import page_table
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.page_table import PageTable
from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupStep:
  """What differs from layer group to layer group."""

  page_indices: Leaf  # i32[num_rows, pages_per_seq]
  slots: Leaf  # i32[num_tokens], out of range for tokens without a place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padding:
  """How tokens of a padded batch become flat ones, and back."""

  places: Leaf  # i32[num_tokens], place in the batch; its size for no token
  tokens: Leaf  # i32[batch * length], flat token; `num_tokens` for padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """The tokens of one step, and where each of them lives.

  A step has `num_rows` rows, which are rows of the page table, and `num_tokens`
  tokens. Tokens without a place belong to no row, or to a refused one: nothing
  is written for them, and their attention is 0.
  """

  groups: tuple[GroupStep, ...]
  ok: Leaf  # bool[num_rows], rows that have tokens and were given room
  kv_lens: Leaf  # i32[num_rows], new tokens included; 0 where not ok
  cu_q_lens: Leaf  # i32[num_rows + 1], offsets of the rows' tokens
  positions: Leaf  # i32[num_tokens], or as the caller's batch; 0 if no place
  is_token: Leaf  # bool, the same shape: whether the token has a place
  tree_mask: Leaf | None = None  # bool[num_tokens, max_new]
  padding: Padding | None = None
  # Most tokens of a row, if known. 1: decode, token i is that of row i.
  max_q_len: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  @property
  def num_rows(self) -> int:
    """Rows of the step."""
    return self.kv_lens.shape[0]

  def rows_of_tokens(self) -> Int[Array, " num_tokens"]:
    """Returns the row of each flat token; `num_rows` past the last."""
    num_tokens = self.groups[0].slots.shape[0]
    return _rows_of_tokens(self.cu_q_lens, num_tokens)


def begin_step(
  cache: PagedCache,
  q_lens: Int[Array, " num_rows"],
  num_tokens: int,
  *,
  rows: Int[Array, " num_rows"] | None = None,
  max_q_len: int | None = None,
  tree_mask: Bool[Array, "num_tokens max_new"] | None = None,
) -> tuple[PagedCache, Step]:
  """Reserves room for the next tokens of rows: prefill, decode, or a mixture.

  The tokens of row `i` are `cu_q_lens[i] : cu_q_lens[i + 1]` of the flat token
  axis. With `max_q_len=1`, for decode, token `i` is that of row `i`, and rows
  without a token leave their place unused.

  Args:
    cache: The cache.
    q_lens: i32[num_rows], new tokens of each row, 0 for none.
    num_tokens: Length of the flat token axis: at least the sum of `q_lens`, or
      with `max_q_len=1` the number of rows.
    rows: i32[num_rows], rows of the page table, in the order in which they are
      served; `num_seqs`, or any other number out of range, for none: tokens of
      such rows are padding. None takes all rows in their order.
    max_q_len: Most tokens of a row, if known. Up to 8, the decode kernel serves
      the attention.
    tree_mask: bool[num_tokens, max_new], which of the new tokens of its row a
      token sees; see `ragged_paged_attention`.

  Returns:
    The cache, in which the lengths of served rows have grown, and the step. Of
    a refused row, nothing has changed, and `step.ok` is False. Rows are refused
    if their tokens do not fit the token axis, exceed `max_q_len`, find no room
    (see `page_table.append`), or are named twice.

  Raises:
    ValueError: If an argument has another shape or dtype, or if `q_lens` are
      known and negative, or do not fit `num_tokens` or `max_q_len`.
  """
  num_rows = cache.num_seqs if rows is None else jnp.size(rows)
  if rows is not None and num_rows > cache.num_seqs:
    raise ValueError(
      f"rows.shape={jnp.shape(rows)} must be at most {cache.num_seqs=} rows."
    )
  _check_known(q_lens, num_tokens, max_q_len)
  q_lens = page_table.integers(q_lens, (num_rows,), "q_lens")
  if rows is not None:
    rows = page_table.integers(rows, (num_rows,), "rows")
    # A gather would take -1 for the last row.
    rows = jnp.where(
      (rows >= 0) & (rows < cache.num_seqs), rows, cache.num_seqs
    )
  if max_q_len == 1 and num_tokens != num_rows:
    raise ValueError(
      f"{num_tokens=} must be {num_rows=} with max_q_len=1: token i is that "
      "of row i."
    )
  cu_q_lens, wanted = _spans(q_lens, num_tokens, max_q_len)
  cache, ok = _reserve(cache, wanted, rows, max_q_len or num_tokens)

  # Where tokens live.
  all_rows = jnp.arange(cache.num_seqs, dtype=jnp.int32)
  table_rows = all_rows if rows is None else rows
  kv_lens = cache.kv_lens
  if rows is not None:
    kv_lens = kv_lens.at[rows].get(mode="fill", fill_value=0)
  kv_lens = jnp.where(ok, kv_lens, 0)
  if max_q_len == 1:
    is_token, positions = ok, jnp.where(ok, kv_lens - 1, 0)
    rows_of_tokens = jnp.where(ok, table_rows, cache.num_seqs)
  else:
    row = _rows_of_tokens(cu_q_lens, num_tokens)
    is_token = ok.at[row].get(mode="fill", fill_value=False)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    from_end = cu_q_lens[1:].at[row].get(mode="clip") - token
    positions = kv_lens.at[row].get(mode="clip") - from_end
    positions = jnp.where(is_token, positions, 0)
    rows_of_tokens = table_rows.at[row].get(mode="clip")
    # Of a refused row, only the old tokens are stored.
    rows_of_tokens = jnp.where(is_token, rows_of_tokens, cache.num_seqs)
  groups = tuple(
    GroupStep(
      page_indices=_entries(group.table, rows),
      slots=page_table.slots(group.table, rows_of_tokens, positions),
    )
    for group in cache.groups
  )
  return cache, Step(
    groups=groups,
    ok=ok,
    kv_lens=kv_lens,
    cu_q_lens=cu_q_lens,
    positions=positions,
    is_token=is_token,
    tree_mask=tree_mask,
    max_q_len=max_q_len,
  )


def begin_padded(cache: PagedCache, mask: Array) -> tuple[PagedCache, Step]:
  """Reserves room for the tokens of a padded batch; see `begin_step`.

  The batch has a row for each row of the cache. Padding may be on the left, on
  the right, or between tokens. Arrays that layers hand to `attend_layer` then
  have the axes `[batch, length]` in place of the token axis, and so have
  `step.positions` and `step.is_token`.

  Args:
    cache: The cache.
    mask: bool or integers [batch, length], True or not 0 where there is a
      token. A batch of length 1 is a decode step.

  Returns:
    The cache and the step, as `begin_step`.

  Raises:
    ValueError: If `mask` has another shape or dtype.
  """
  dtype, shape = jnp.result_type(mask), jnp.shape(mask)
  is_flag = dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)
  fits = len(shape) == 2 and shape[0] == cache.num_seqs and shape[1] > 0
  if not fits or not is_flag:
    raise ValueError(
      f"mask must be bool or integers [{cache.num_seqs}, length], got "
      f"{dtype}{shape}."
    )
  mask = jnp.asarray(mask).astype(jnp.bool_)
  batch, length = shape
  num_tokens = batch * length
  q_lens = jnp.sum(mask, axis=1, dtype=jnp.int32)
  cache, step = begin_step(
    cache, q_lens, num_tokens, max_q_len=1 if length == 1 else None
  )
  if length == 1:
    return cache, dataclasses.replace(
      step,
      positions=step.positions[:, None],
      is_token=step.is_token[:, None],
    )
  # The n-th token of a row is the n-th of its span on the flat axis.
  nth = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  tokens = jnp.where(mask, step.cu_q_lens[:-1, None] + nth, num_tokens)
  tokens = tokens.reshape(-1)
  places = jnp.full(num_tokens, num_tokens, jnp.int32)
  place = jnp.arange(num_tokens, dtype=jnp.int32)
  places = places.at[tokens].set(place, mode="drop", unique_indices=True)
  by_place = lambda x: (
    x.at[tokens].get(mode="fill", fill_value=0).reshape(batch, length)
  )
  return cache, dataclasses.replace(
    step,
    positions=by_place(step.positions),
    is_token=by_place(step.is_token),
    padding=Padding(places=places, tokens=tokens),
  )


def _check_known(q_lens: Array, num_tokens: int, max_q_len: int | None) -> None:
  """Raises a ValueError if values that are known are out of their range."""
  if num_tokens < 1:
    raise ValueError(f"{num_tokens=} must be at least 1.")
  if max_q_len is not None and max_q_len < 1:
    raise ValueError(f"{max_q_len=} must be at least 1.")
  if isinstance(q_lens, jax.core.Tracer):
    return
  known = np.asarray(q_lens)
  most = num_tokens if max_q_len is None else max_q_len
  if known.size and not 0 <= known.min() <= known.max() <= most:
    raise ValueError(f"q_lens={known.tolist()} must be in [0, {most}].")
  if known.sum() > num_tokens:
    raise ValueError(
      f"q_lens={known.tolist()} have {known.sum()} tokens; {num_tokens=} is "
      "the limit."
    )


def _spans(
  q_lens: Array, num_tokens: int, max_q_len: int | None
) -> tuple[Array, Array]:
  """Returns offsets of rows on the token axis, and the tokens they may have.

  A row whose tokens do not fit whole may have none, but keeps its span.
  """
  if max_q_len == 1:
    offsets = jnp.arange(q_lens.shape[0] + 1, dtype=jnp.int32)
    return offsets, jnp.where(q_lens == 1, 1, 0)
  # Clamped, so that sums of huge lengths do not wrap around.
  spans = jnp.clip(q_lens, 0, num_tokens + 1)
  ends = jnp.cumsum(spans, dtype=jnp.int32)
  most = num_tokens if max_q_len is None else max_q_len
  fits = (ends <= num_tokens) & (q_lens > 0) & (q_lens <= most)
  offsets = jnp.minimum(jnp.pad(ends, (1, 0)), num_tokens)
  return offsets, jnp.where(fits, q_lens, 0)


def _reserve(
  cache: PagedCache, wanted: Array, rows: Array | None, max_new_tokens: int
) -> tuple[PagedCache, Array]:
  """Returns the cache with room for tokens, and bool[num_rows], who got it."""
  append = functools.partial(paged_cache.append, max_new_tokens=max_new_tokens)
  if rows is None:
    cache, ok = append(cache, wanted)
    return cache, ok & (wanted > 0)
  num_seqs = cache.num_seqs
  asks = rows < num_seqs
  asks &= page_table.first_to_name(rows, asks)
  wanted = jnp.where(asks, wanted, 0)
  where = jnp.where(asks, rows, num_seqs)
  by_row = jnp.zeros(num_seqs, jnp.int32).at[where].set(wanted, mode="drop")
  cache, ok = append(cache, by_row, order=_order(where, num_seqs))
  return cache, ok.at[where].get(mode="fill", fill_value=False) & (wanted > 0)


def _order(rows: Array, num_seqs: int) -> Array:
  """Returns rows as `page_table.append` takes an order: num_seqs entries."""
  missing = max(num_seqs - rows.shape[0], 0)
  padded = jnp.pad(rows, (0, missing), constant_values=num_seqs)
  return padded[:num_seqs]


def _entries(table: PageTable, rows: Array | None) -> Array:
  """Returns i32[num_rows, pages_per_seq], the pages of the step's rows."""
  if rows is None:
    return table.page_indices
  return table.page_indices.at[rows].get(
    mode="fill", fill_value=table.num_pages
  )


def _rows_of_tokens(cu_q_lens: Array, num_tokens: int) -> Array:
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  row = jnp.searchsorted(cu_q_lens[1:], token, side="right")
  return row.astype(jnp.int32)
