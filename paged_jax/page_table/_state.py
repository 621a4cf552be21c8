"""The state of the page table, and what can be read off it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
  """Pages of every sequence, their reference counts, and the free pages.

  The value `num_pages` means "no page". Never -1: a scatter or a gather with a
  negative index wraps to the last page.
  """

  page_indices: Leaf  # i32[num_seqs, pages_per_seq], num_pages where unmapped
  kv_lens: Leaf  # i32[num_seqs], tokens stored
  # A row can be cut to this length, no further: below it, the window of its
  # last token would reach into pages that were given back. 0: none were.
  min_lens: Leaf  # i32[num_seqs]
  ref_counts: Leaf  # i32[num_pages], rows that name the page, plus holds
  holds: Leaf  # i32[num_pages], times that a prefix cache holds the page
  free_pages: Leaf  # i32[num_pages], a stack: the first num_free are free
  num_free: Leaf  # i32[]
  tenants: Leaf  # i32[num_seqs], whose quota the row's pages count against
  quotas: Leaf | None  # i32[num_tenants], most pages; None: no limits at all
  page_size: int = dataclasses.field(metadata=dict(static=True))  # tokens
  # Whether transitions check their result (see `assert_valid`).
  debug: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def num_seqs(self) -> int:
    """Rows of the batch."""
    return self.page_indices.shape[0]

  @property
  def pages_per_seq(self) -> int:
    """Most pages that a row can name."""
    return self.page_indices.shape[1]

  @property
  def num_pages(self) -> int:
    """Pages of the pool; as a page index, no page."""
    return self.ref_counts.shape[0]

  @property
  def num_tenants(self) -> int:
    """Tenants that have a quota; 0 where nothing is limited."""
    return 0 if self.quotas is None else self.quotas.shape[0]

  @property
  def max_len(self) -> int:
    """Longest sequence that a row can hold, in tokens."""
    return self.pages_per_seq * self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Changed:
  """The next table, and what of the request was carried out."""

  table: PageTable
  ok: Leaf  # bool, one for each entry of the request


def init(
  num_pages: int,
  page_size: int,
  num_seqs: int,
  pages_per_seq: int,
  *,
  tenants: Sequence[int] | None = None,
  quotas: Sequence[int] | None = None,
  debug: bool = False,
) -> PageTable:
  """Returns an empty table: every row of length 0, every page free.

  Args:
    num_pages: Pages of the pool, at least 1.
    page_size: Tokens a page holds; a positive multiple of 8.
    num_seqs: Rows of the batch, at least 1.
    pages_per_seq: Most pages a row can name, at least 1.
    tenants: Tenant of each row, in `[0, len(quotas))`; 0 if left out.
    quotas: Most pages that the rows of each tenant may name, all together, at
      least 0; `NO_QUOTA` for no limit. A page counts once for each row that
      names it. Left out, nothing is limited.
    debug: Whether each transition checks its result (see `assert_valid`).

  Raises:
    ValueError: If an argument is out of its range.
  """
  _check_sizes(num_pages, page_size, num_seqs, pages_per_seq)
  owners, limits = _tenancy(num_seqs, tenants, quotas)
  return PageTable(
    page_indices=jnp.full((num_seqs, pages_per_seq), num_pages, jnp.int32),
    kv_lens=jnp.zeros(num_seqs, jnp.int32),
    min_lens=jnp.zeros(num_seqs, jnp.int32),
    ref_counts=jnp.zeros(num_pages, jnp.int32),
    holds=jnp.zeros(num_pages, jnp.int32),
    # Popped from the end: page 0 is handed out first.
    free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
    num_free=jnp.asarray(num_pages, jnp.int32),
    tenants=jnp.asarray(owners, jnp.int32),
    quotas=None if limits is None else jnp.asarray(limits, jnp.int32),
    page_size=page_size,
    debug=debug,
  )


def pages_for(num_tokens: Array | int, page_size: int) -> Array:
  """Returns how many pages of `page_size` hold `num_tokens` tokens."""
  return (jnp.asarray(num_tokens) + (page_size - 1)) // page_size


def slots(
  table: PageTable,
  seq_ids: Int[Array, " num_tokens"],
  positions: Int[Array, " num_tokens"],
) -> Int[Array, " num_tokens"]:
  """Returns where in the pool tokens live: `page * page_size + offset`.

  Args:
    table: The table.
    seq_ids: i32[num_tokens], row of each token.
    positions: i32[num_tokens], position of each token in its row.

  Returns:
    i32[num_tokens]; `num_pages * page_size`, which writes drop, for tokens
    outside `[0, kv_lens)` of their row, of no row, or in an unmapped page.
  """
  inside = (seq_ids >= 0) & (seq_ids < table.num_seqs)
  row = jnp.where(inside, seq_ids, 0)
  inside &= (positions >= 0) & (positions < table.kv_lens[row])
  position = jnp.where(inside, positions, 0)
  page = table.page_indices[row, position // table.page_size]
  slot = page * table.page_size + position % table.page_size
  nowhere = table.num_pages * table.page_size
  return jnp.where(inside & (page < table.num_pages), slot, nowhere)


def mapped(table: PageTable) -> Array:
  """Returns bool[num_seqs, pages_per_seq]: the entries that name a page."""
  return table.page_indices < table.num_pages


def integers(value: Array | int, shape: tuple[int, ...], name: str) -> Array:
  """Returns `value` as i32, after a check of its shape and dtype."""
  if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    # 64 bits would wrap around; the ends of 32 are out of any range.
    value = np.clip(value, -(2**31), 2**31 - 1).astype(np.int32)
  array = jnp.asarray(value)
  if array.shape != shape:
    raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {array.dtype}.")
  return array.astype(jnp.int32)


def check_rows(table: PageTable, rows: Array) -> None:
  """Raises a ValueError if `rows` is not bool[num_seqs]."""
  dtype, shape = jnp.result_type(rows), jnp.shape(rows)
  if shape != (table.num_seqs,) or dtype != jnp.bool_:
    raise ValueError(
      f"rows must be bool[{table.num_seqs}], got {dtype}{shape}."
    )


def first_to_name(rows: Array, asks: Array) -> Array:
  """Returns bool[k]: whether no earlier entry that asks has the same row."""
  entry = jnp.arange(rows.shape[0], dtype=jnp.int32)
  earlier = entry[:, None] > entry[None]
  same = (rows[:, None] == rows[None]) & asks[None]
  return ~jnp.any(earlier & same, axis=1)


def _check_sizes(
  num_pages: int, page_size: int, num_seqs: int, pages_per_seq: int
) -> None:
  sizes = dict(
    num_pages=num_pages, num_seqs=num_seqs, pages_per_seq=pages_per_seq
  )
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if page_size < 1 or page_size % 8:
    raise ValueError(f"{page_size=} must be a positive multiple of 8.")
  if pages_per_seq * page_size >= 2**30:
    raise ValueError(
      f"{pages_per_seq=} pages of {page_size=} tokens pass the limit of "
      "2**30 - 1 tokens a sequence."
    )
  if num_seqs * pages_per_seq >= 2**31:
    raise ValueError(
      f"{num_seqs=} rows of {pages_per_seq=} pass the limit of 2**31 - 1 "
      "entries."
    )


def _tenancy(
  num_seqs: int,
  tenants: Sequence[int] | None,
  quotas: Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the tenant of each row, and the quotas if there are any."""
  limits = np.asarray(() if quotas is None else quotas, np.int64)
  owners = np.asarray([0] * num_seqs if tenants is None else tenants, np.int64)
  if limits.ndim != 1 or (limits < 0).any() or (limits >= 2**31).any():
    raise ValueError(f"{quotas=} must be one number of pages per tenant.")
  if owners.shape != (num_seqs,):
    raise ValueError(f"{tenants=} must have one entry for each row.")
  if (owners < 0).any() or (owners >= max(1, limits.size)).any():
    raise ValueError(f"{tenants=} must be in [0, {max(1, limits.size)}).")
  return owners, limits if limits.size else None
