"""Reserves pages for new tokens, and asks for copies of shared pages."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table import _quota, arguments
from paged_jax.page_table._check import checked
from paged_jax.page_table._state import PageTable, pages_for
from paged_jax.typing import Leaf
from pallas_kernels.common.rounding import cdiv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageCopies:
  """Pages to copy before the next write; see `paged_jax.kv.pool.copy_pages`."""

  src: Leaf  # i32[num_copies], num_pages for no copy
  dst: Leaf  # i32[num_copies], num_pages for no copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appended:
  """Result of `append`."""

  table: PageTable
  ok: Leaf  # bool[num_seqs], False for refused rows
  copies: PageCopies  # num_copies = num_seqs: at most one for each row


@checked
def append(
  table: PageTable,
  num_new_tokens: Int[Array, " num_seqs"],
  *,
  order: Int[Array, " num_seqs"] | None = None,
  max_new_tokens: int | None = None,
) -> Appended:
  """Reserves pages for the new tokens of all rows at once.

  The length of each served row grows by its number of new tokens. A refused
  row stays bit for bit as it was. The caller then carries out the copies
  (`paged_jax.kv.pool.copy_pages`) and writes K and V at the slots of the new
  tokens (`slots`).

  A row that writes into a last page that has other references needs a page for
  a copy. If only rows of this call reference the page, and all of them write to
  it and are served, the first of them keeps the page instead.

  The following rules decide which rows are served, in this order:

  1. A row is refused if it asks for a negative number of tokens, for more than
     `max_new_tokens`, or for more than the width of the table allows.
  2. Quotas: the remaining rows of each tenant are served in order until the
     first whose new pages exceed the quota. That row and every later row of
     the tenant that needs new pages are refused. Copies do not count.
  3. Pages: the remaining rows are served in order until the first that does
     not fit in the free pages. That row and every later row that needs a page,
     for new tokens or for a copy, are refused. A row that can keep a shared
     page only because all other rows copy it is refused if one of them is.

  Args:
    table: The current table.
    num_new_tokens: i32[num_seqs], tokens to add to each row, at least 0.
    order: i32[num_seqs], rows in the order in which they are served; rows that
      are missing come last. If None, rows are served in row order.
    max_new_tokens: Upper bound of `num_new_tokens`, at least 1, if known; a
      small bound makes the step cheaper.

  Returns:
    The next table; `ok` bool[num_seqs], False for refused rows; the copies. A
    row that asks for no token is always `ok`.

  Raises:
    ValueError: If `num_new_tokens` or `order` has the wrong shape or is not an
      integer array, or if `max_new_tokens` is below 1.
  """
  num_seqs, page_size = table.num_seqs, table.page_size
  num_new = arguments.integers(num_new_tokens, (num_seqs,), "num_new_tokens")
  limit = table.max_len if max_new_tokens is None else max_new_tokens
  if limit < 1:
    raise ValueError(f"{max_new_tokens=} must be at least 1.")
  valid, new_lens, need = _wanted(table, num_new, limit)
  ahead = _ahead(num_seqs, order)
  valid &= _quota.allows(table, table.tenants, need, ahead)
  need = jnp.where(valid, need, 0)
  writes = valid & (num_new > 0) & (table.kv_lens % page_size != 0)
  ok, copies, src = _serve(table, valid, need, writes, ahead)

  # A copy replaces the last page, so it precedes the new pages.
  taken = jnp.where(ok, need + copies.astype(jnp.int32), 0)
  most = 1 + cdiv(limit - 1, page_size)
  first = pages_for(table.kv_lens, page_size) - copies.astype(jnp.int32)
  table, pages = _pop(
    table, taken, first, ahead, min(most, table.pages_per_seq)
  )
  dst = jnp.where(copies, pages[:, 0], table.num_pages)
  # Another row or hold keeps every page that is copied: no count reaches 0.
  counts = table.ref_counts.at[src].add(-1, mode="drop")
  new_lens = jnp.where(ok, new_lens, table.kv_lens)
  return Appended(
    table=dataclasses.replace(table, kv_lens=new_lens, ref_counts=counts),
    ok=ok,
    copies=PageCopies(src=src, dst=dst),
  )


def _wanted(
  table: PageTable, num_new: Array, limit: int
) -> tuple[Array, Array, Array]:
  """Returns the rows with a valid request, their new lengths and new pages."""
  # Clamped: the sum with a huge request would overflow to a small length.
  new_lens = table.kv_lens + jnp.minimum(num_new, table.max_len + 1)
  valid = (num_new >= 0) & (num_new <= limit) & (new_lens <= table.max_len)
  need = pages_for(new_lens, table.page_size)
  need -= pages_for(table.kv_lens, table.page_size)
  return valid, new_lens, jnp.where(valid, need, 0)


def _ahead(num_seqs: int, order: Array | None) -> Array:
  """Returns bool[num_seqs, num_seqs]: `[i, j]` is True if row j precedes row i.

  A sum over the preceding rows is then one small masked product, where a
  cumulative sum would be a chain of kernels on a GPU.
  """
  row = jnp.arange(num_seqs, dtype=jnp.int32)
  earlier = row[:, None] > row[None]
  if order is None:
    return earlier
  order = arguments.integers(order, (num_seqs,), "order")
  rows = arguments.or_none(order, num_seqs)
  rank = jnp.full_like(row, num_seqs).at[rows].min(row, mode="drop")
  # Ties go by row, so any `order` gives a strict order, and no two rows get
  # the same page.
  return (rank[:, None] > rank[None]) | (
    (rank[:, None] == rank[None]) & earlier
  )


def _sum_ahead(ahead: Array, values: Array) -> Array:
  return jnp.sum(jnp.where(ahead, values[None], 0), axis=1, dtype=jnp.int32)


def _serve(
  table: PageTable,
  valid: Bool[Array, " num_seqs"],
  need: Int[Array, " num_seqs"],
  writes: Bool[Array, " num_seqs"],
  ahead: Bool[Array, "num_seqs num_seqs"],
) -> tuple[Array, Array, Array]:
  """Decides which rows are served, and which of them copy their last page.

  Only a partly filled last page can be both shared and written. If the rows
  of the call that write to a page have all references to it, they need one copy
  less than their number. Which row keeps the page does not change the number of
  pages needed, so the rows that fit are determined first.

  Args:
    table: The table.
    valid: bool[num_seqs], rows that may be served.
    need: i32[num_seqs], new pages of each row.
    writes: bool[num_seqs], rows that write into their last page.
    ahead: bool[num_seqs, num_seqs]; see `_ahead`.

  Returns:
    bool[num_seqs], rows that are served; bool[num_seqs], rows that copy their
    last page; i32[num_seqs], pages to copy, `num_pages` for none.
  """
  row = jnp.arange(table.num_seqs, dtype=jnp.int32)
  column = jnp.maximum(pages_for(table.kv_lens, table.page_size) - 1, 0)
  page = table.page_indices[row, column]
  same_page = (page[:, None] == page[None]) & writes[:, None] & writes[None]
  num_writers = jnp.sum(same_page, axis=1, dtype=jnp.int32)
  num_references = table.ref_counts.at[page].get(mode="clip")
  has_all_references = writes & (num_writers == num_references)

  # To find the rows that fit, let the last writer of a page keep it.
  is_last = has_all_references & ~jnp.any(same_page & ahead.T, axis=1)
  want = need + (writes & ~is_last).astype(jnp.int32)
  total = want + _sum_ahead(ahead, want)
  fits = valid & ((want == 0) | (total <= table.num_free))
  all_fit = ~jnp.any(same_page & ~fits[None], axis=1)
  ok = fits & (~is_last | all_fit)

  # In the result, the first writer keeps it.
  is_first = has_all_references & ~jnp.any(same_page & ahead, axis=1)
  copies = ok & writes & ~(is_first & all_fit)
  return ok, copies, jnp.where(copies, page, table.num_pages)


def _pop(
  table: PageTable,
  taken: Int[Array, " num_seqs"],
  first: Int[Array, " num_seqs"],
  ahead: Bool[Array, "num_seqs num_seqs"],
  most: int,
) -> tuple[PageTable, Int[Array, "num_seqs most"]]:
  """Pops pages off the stack and puts them into the rows.

  Args:
    table: The table.
    taken: i32[num_seqs], pages that each row gets; enough pages are free.
    first: i32[num_seqs], column of each row's first new page.
    ahead: bool[num_seqs, num_seqs]; see `_ahead`.
    most: Upper bound of `taken`.

  Returns:
    The next table, and i32[num_seqs, most], the pages that each row got.
  """
  row = jnp.arange(table.num_seqs, dtype=jnp.int32)
  rank = jnp.arange(most, dtype=jnp.int32)
  depth = table.num_free - 1 - _sum_ahead(ahead, taken)
  is_taken = rank[None] < taken[:, None]
  pages = table.free_pages.at[depth[:, None] - rank[None]].get(mode="clip")
  pages = jnp.where(is_taken, pages, table.num_pages)
  column = first[:, None] + rank[None]
  column = jnp.where(is_taken, column, table.pages_per_seq)
  entries = table.page_indices.at[row[:, None], column].set(pages, mode="drop")
  counts = table.ref_counts.at[pages].set(1, mode="drop")
  num_free = table.num_free - jnp.sum(taken, dtype=jnp.int32)
  return dataclasses.replace(
    table, page_indices=entries, ref_counts=counts, num_free=num_free
  ), pages
