"""The tokens of one model step, and their slots in the cache.

`begin_step` reserves pages for all rows at once, outside the layers, and
computes the position and the slot of each token. Every layer then writes its
keys and values at these slots and attends through the page table
(`attend_layer`).
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
from paged_jax.page_table import PageTable, arguments
from paged_jax.typing import Leaf
from pallas_kernels.common.spec import check_count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupStep:
  """The part of a step that differs between layer groups."""

  page_indices: Leaf  # i32[num_rows, pages_per_seq]
  slots: Leaf  # i32[num_tokens], out of range for tokens that are not stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padding:
  """Maps tokens of a padded batch to flat tokens, and back."""

  # i32[num_tokens], index of each flat token in the batch seen flat;
  # `batch * length` past the last token.
  places: Leaf
  tokens: Leaf  # i32[batch * length], flat token; `num_tokens` for padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """The tokens of one step, with their positions and slots.

  A step has `num_rows` rows, each a row of the page table, and `num_tokens`
  tokens. Tokens of no row or of a refused row are not stored, and their
  attention output is 0.
  """

  groups: tuple[GroupStep, ...]
  ok: Leaf  # bool[num_rows], rows that have tokens and were served
  kv_lens: Leaf  # i32[num_rows], new tokens included; 0 where not ok
  cu_q_lens: Leaf  # i32[num_rows + 1], offsets of the rows' tokens
  # i32[num_tokens], or [batch, length] after `begin_padded`; 0 if not stored.
  positions: Leaf
  is_token: Leaf  # bool, in the shape of positions: whether it is stored
  tree_mask: Leaf | None = None  # bool[num_tokens, max_new]
  padding: Padding | None = None
  # Upper bound of the tokens of a row, if known. 1: row i has token i (decode).
  max_q_len: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  @property
  def num_rows(self) -> int:
    """Number of rows of the step."""
    return self.kv_lens.shape[0]

  def rows_of_tokens(self) -> Int[Array, " num_tokens"]:
    """Returns i32[num_tokens], the row of each token; `num_rows` for none."""
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
  """Reserves pages for the new tokens of a step: prefill, decode, or a mixture.

  The tokens of all rows lie one after the other on a flat token axis: row `i`
  has the tokens `cu_q_lens[i] : cu_q_lens[i + 1]`. With `max_q_len=1` (decode),
  row `i` has token `i`, which is padding if `q_lens[i] == 0`.

  Args:
    cache: The cache; donate it, and do not read the old one afterwards.
    q_lens: i32[num_rows], new tokens of each row, 0 for none.
    num_tokens: Length of the flat token axis, at least 1: at least the sum of
      `q_lens`, or with `max_q_len=1` the number of rows.
    rows: i32[num_rows], rows of the page table in the order in which they are
      served; `num_seqs`, or any number out of range, for padding. If None, all
      rows are served in row order.
    max_q_len: Upper bound of `q_lens`, at least 1, if known. If it is at most
      8, the decode kernel computes the attention.
    tree_mask: bool[num_tokens, max_new], which new tokens of its row a token
      attends to; see `ragged_paged_attention`.

  Returns:
    The next cache, in which the lengths of served rows have grown, and the
    step. A row is refused if its tokens do not fit on the token axis, exceed
    `max_q_len`, or find no pages (see `page_table.append`), or if it is given
    twice. A refused row stays as it was, and its `step.ok` is False.

  Raises:
    ValueError: If `q_lens` or `rows` has the wrong shape or is not an integer
      array, `num_tokens` or `max_q_len` is below 1, `num_tokens` is not the
      number of rows with `max_q_len=1`, or, outside jit, `q_lens` are negative
      or exceed `max_q_len` or `num_tokens`.
    NotImplementedError: If `cache.implementation` cannot copy pages here.

  Example:
    # One decode step of a model: tokens[i] continues row i.
    q_lens = jnp.ones_like(tokens)
    cache, step = begin_step(cache, q_lens, len(tokens), max_q_len=1)
    x = embed(tokens)
    for i, layer in enumerate(layers):
      q, k, v = layer.qkv(x)  # [num_tokens, heads, head_dim] each
      q = apply_rotary(q, step.positions, theta)
      k = apply_rotary(k, step.positions, theta)
      y, cache = attend_layer(q, k, v, cache, step, i)
      x = x + layer.output(y)
    logits = head(x)
  """
  num_rows = cache.num_seqs if rows is None else jnp.size(rows)
  if rows is not None and num_rows > cache.num_seqs:
    raise ValueError(
      f"rows.shape={jnp.shape(rows)} must have at most {cache.num_seqs=} rows."
    )
  _check_sizes(num_tokens, max_q_len, tree_mask)
  _check_known(q_lens, num_tokens, max_q_len)
  q_lens = arguments.integers(q_lens, (num_rows,), "q_lens")
  if rows is not None:
    rows = arguments.integers(rows, (num_rows,), "rows")
    rows = arguments.or_none(rows, cache.num_seqs)
  if max_q_len == 1 and num_tokens != num_rows:
    raise ValueError(
      f"{num_tokens=} must be {num_rows=} with max_q_len=1: row i has token i."
    )
  cu_q_lens, wanted = _spans(q_lens, num_tokens, max_q_len)
  cache, ok = _reserve(cache, wanted, rows, max_q_len or num_tokens)

  kv_lens = cache.kv_lens
  if rows is not None:
    kv_lens = kv_lens.at[rows].get(mode="fill", fill_value=0)
  kv_lens = jnp.where(ok, kv_lens, 0)
  if max_q_len == 1:
    row, is_token = jnp.arange(num_rows, dtype=jnp.int32), ok
    positions = jnp.where(ok, kv_lens - 1, 0)
  else:
    row = _rows_of_tokens(cu_q_lens, num_tokens)
    is_token = ok.at[row].get(mode="fill", fill_value=False)
    positions = _positions(cu_q_lens, kv_lens, row, is_token)
  table_row = row if rows is None else rows.at[row].get(mode="clip")
  # New tokens of a refused row are not stored.
  table_row = jnp.where(is_token, table_row, cache.num_seqs)
  groups = tuple(
    GroupStep(
      page_indices=_entries(group.table, rows),
      slots=page_table.slots(group.table, table_row, positions),
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
  """Reserves pages for the tokens of a padded batch; see `begin_step`.

  Row `i` of the batch is row `i` of the cache. Padding may be on the left, on
  the right, or between tokens. The arrays given to `attend_layer`,
  `step.positions` and `step.is_token` then have the axes `[batch, length]` in
  place of the token axis.

  Args:
    cache: The cache; donate it, and do not read the old one afterwards.
    mask: bool or integer [num_seqs, length], True or nonzero for tokens. A
      batch of length 1 is a decode step.

  Returns:
    The next cache and the step; see `begin_step`.

  Raises:
    ValueError: If `mask` has another shape or dtype, or no column.
    NotImplementedError: If `cache.implementation` cannot copy pages here.
  """
  mask = mask if isinstance(mask, jax.Array) else jnp.asarray(mask)
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
  # The n-th token of a row is the n-th in the row's span of the flat axis.
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


def _check_sizes(
  num_tokens: int, max_q_len: int | None, tree_mask: Array | None
) -> None:
  """Raises a ValueError if a static size or the mask does not fit."""
  check_count("num_tokens", num_tokens, 1)
  if max_q_len is not None:
    check_count("max_q_len", max_q_len, 1)
  if tree_mask is not None:
    dtype, shape = jnp.result_type(tree_mask), jnp.shape(tree_mask)
    if len(shape) != 2 or shape[0] != num_tokens or dtype != jnp.bool_:
      raise ValueError(
        f"tree_mask must be bool[{num_tokens}, max_new], got {dtype}{shape}."
      )


def _check_known(q_lens: Array, num_tokens: int, max_q_len: int | None) -> None:
  """Raises a ValueError if lengths outside jit are out of range."""
  if isinstance(q_lens, jax.core.Tracer):
    return
  known = np.asarray(q_lens)
  most = num_tokens if max_q_len is None else max_q_len
  if known.size and not 0 <= known.min() <= known.max() <= most:
    raise ValueError(f"q_lens={known.tolist()} must be in [0, {most}].")
  if known.sum() > num_tokens:
    raise ValueError(
      f"q_lens={known.tolist()} have {known.sum()} tokens, which exceed "
      f"{num_tokens=}."
    )


def _spans(
  q_lens: Array, num_tokens: int, max_q_len: int | None
) -> tuple[Array, Array]:
  """Returns the offsets of rows on the token axis, and the tokens to reserve.

  A row whose tokens do not fit reserves none, but keeps its span of the axis.
  """
  if max_q_len == 1:
    offsets = jnp.arange(q_lens.shape[0] + 1, dtype=jnp.int32)
    return offsets, jnp.where(q_lens == 1, 1, 0)
  # Clamped, so that the sum of huge lengths does not overflow.
  spans = jnp.clip(q_lens, 0, num_tokens + 1)
  ends = jnp.cumsum(spans, dtype=jnp.int32)
  most = num_tokens if max_q_len is None else max_q_len
  fits = (ends <= num_tokens) & (q_lens > 0) & (q_lens <= most)
  offsets = jnp.minimum(jnp.pad(ends, (1, 0)), num_tokens)
  return offsets, jnp.where(fits, q_lens, 0)


def _reserve(
  cache: PagedCache, wanted: Array, rows: Array | None, max_new_tokens: int
) -> tuple[PagedCache, Array]:
  """Returns the next cache, and bool[num_rows], the rows that were served."""
  append = functools.partial(paged_cache.append, max_new_tokens=max_new_tokens)
  if rows is None:
    cache, ok = append(cache, wanted)
    return cache, ok & (wanted > 0)
  num_seqs = cache.num_seqs
  asks = rows < num_seqs
  asks &= arguments.is_first(rows, asks)
  wanted = jnp.where(asks, wanted, 0)
  where = jnp.where(asks, rows, num_seqs)
  by_row = jnp.zeros(num_seqs, jnp.int32).at[where].set(wanted, mode="drop")
  cache, ok = append(cache, by_row, order=_order(where, num_seqs))
  return cache, ok.at[where].get(mode="fill", fill_value=False) & (wanted > 0)


def _order(rows: Array, num_seqs: int) -> Array:
  """Returns `rows` padded to num_seqs entries, for `page_table.append`."""
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


def _positions(
  cu_q_lens: Array, kv_lens: Array, row: Array, is_token: Array
) -> Array:
  """Returns i32[num_tokens], the position of each token in its row.

  Args:
    cu_q_lens: i32[num_rows + 1], spans of the rows on the token axis.
    kv_lens: i32[num_rows], lengths after the step.
    row: i32[num_tokens], row of each token.
    is_token: bool[num_tokens], False for padding, which has position 0.
  """
  token = jnp.arange(row.shape[0], dtype=jnp.int32)
  from_end = cu_q_lens[1:].at[row].get(mode="clip") - token
  positions = kv_lens.at[row].get(mode="clip") - from_end
  return jnp.where(is_token, positions, 0)


def _rows_of_tokens(cu_q_lens: Array, num_tokens: int) -> Array:
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  row = jnp.searchsorted(cu_q_lens[1:], token, side="right")
  return row.astype(jnp.int32)
