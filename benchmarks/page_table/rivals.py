"""Methods of other projects to reserve pages, as rivals of `page_table.append`.

Each function maps a state to the next one, with one new token for every row.
They do less than `append`: they count no references, copy no shared page and
refuse no row. A row that finds no page grows without one.

`search_each` is the method of MaxText (`page_manager.py`): each row searches
all pages for a free one, row by row. `search_if_needed` is the method of
Levanter (`page_table.py`): rows that need no page do not search. Both projects
search four bytes per page, and test each time whether any page is free; the
functions here search one byte per page, and keep a count of free pages.
`pop_each` takes pages off a stack, row by row, and `search_once` finds the
pages of all rows in one search.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_jax.page_table import PageTable


class Stacked(NamedTuple):
  """Rows, and a stack of free pages."""

  page_indices: jax.Array  # i32[num_seqs, pages_per_seq]
  kv_lens: jax.Array  # i32[num_seqs]
  free_pages: jax.Array  # i32[num_pages], the first num_free are free
  num_free: jax.Array  # i32[]


class Bitmap(NamedTuple):
  """Rows, and a mask of free pages."""

  page_indices: jax.Array  # i32[num_seqs, pages_per_seq]
  kv_lens: jax.Array  # i32[num_seqs]
  is_free: jax.Array  # bool[num_pages]
  num_free: jax.Array  # i32[]


def stacked(table: PageTable) -> Stacked:
  """Returns the rows and free pages of a table, without reference counts."""
  return Stacked(
    table.page_indices, table.kv_lens, table.free_pages, table.num_free
  )


def bitmap(table: PageTable) -> Bitmap:
  """Returns the rows of a table, and a mask of its free pages."""
  return Bitmap(
    table.page_indices, table.kv_lens, table.ref_counts == 0, table.num_free
  )


def pop_each(state: Stacked, page_size: int) -> Stacked:
  """Rows take a page off the stack, one after the other."""
  num_seqs, pages_per_seq = state.page_indices.shape
  needs, column = _next_token(state.kv_lens, page_size)

  def serve(row, carry):
    page_indices, num_free = carry
    takes = needs[row] & (num_free > 0)
    page = state.free_pages[jnp.maximum(num_free - 1, 0)]
    place = jnp.where(takes, column[row], pages_per_seq)
    page_indices = page_indices.at[row, place].set(page, mode="drop")
    return page_indices, num_free - takes.astype(jnp.int32)

  carry = state.page_indices, state.num_free
  page_indices, num_free = lax.fori_loop(0, num_seqs, serve, carry)
  return Stacked(page_indices, state.kv_lens + 1, state.free_pages, num_free)


def search_each(state: Bitmap, page_size: int) -> Bitmap:
  """Rows search all pages for the first that is free, one after the other."""
  needs, column = _next_token(state.kv_lens, page_size)

  def serve(row, state):
    return _take_first(state, row, column[row], needs[row])

  state = lax.fori_loop(0, len(needs), serve, state)
  return state._replace(kv_lens=state.kv_lens + 1)


def search_if_needed(state: Bitmap, page_size: int) -> Bitmap:
  """Like `search_each`, but rows that need no page do not search."""
  needs, column = _next_token(state.kv_lens, page_size)

  def serve(row, state):
    take = lambda state: _take_first(state, row, column[row], needs[row])
    return lax.cond(needs[row], take, lambda state: state, state)

  state = lax.fori_loop(0, len(needs), serve, state)
  return state._replace(kv_lens=state.kv_lens + 1)


def _take_first(state: Bitmap, row, column, needs) -> Bitmap:
  """Gives a row the first free page, if it needs one and there is one."""
  pages_per_seq, num_pages = state.page_indices.shape[1], len(state.is_free)
  page = jnp.argmax(state.is_free).astype(jnp.int32)
  takes = needs & (state.num_free > 0)
  place = jnp.where(takes, column, pages_per_seq)
  taken = jnp.where(takes, page, num_pages)
  return state._replace(
    page_indices=state.page_indices.at[row, place].set(page, mode="drop"),
    is_free=state.is_free.at[taken].set(False, mode="drop"),
    num_free=state.num_free - takes.astype(jnp.int32),
  )


def search_once(state: Bitmap, page_size: int) -> Bitmap:
  """One search of all pages finds a free page for every row."""
  num_seqs, pages_per_seq = state.page_indices.shape
  num_pages = state.is_free.shape[0]
  needs, column = _next_token(state.kv_lens, page_size)
  (found,) = jnp.nonzero(state.is_free, size=num_seqs, fill_value=num_pages)
  rank = jnp.cumsum(needs, dtype=jnp.int32) - 1
  pages = jnp.where(needs, found.astype(jnp.int32)[rank], num_pages)
  row = jnp.arange(num_seqs, dtype=jnp.int32)
  takes = pages < num_pages
  place = jnp.where(takes, column, pages_per_seq)
  return Bitmap(
    state.page_indices.at[row, place].set(pages, mode="drop"),
    state.kv_lens + 1,
    state.is_free.at[pages].set(False, mode="drop"),
    state.num_free - jnp.sum(takes, dtype=jnp.int32),
  )


def _next_token(kv_lens, page_size):
  """Returns which rows need a page for their next token, and its column."""
  return kv_lens % page_size == 0, kv_lens // page_size


def free_mask(state: PageTable | Stacked | Bitmap) -> np.ndarray:
  """Returns the mask of free pages, bool[num_pages]."""
  if isinstance(state, Bitmap):
    return np.asarray(state.is_free)
  free = np.zeros(state.free_pages.shape[0], bool)
  free[np.asarray(state.free_pages)[: int(state.num_free)]] = True
  return free


def verify_lens(before: PageTable, kv_lens: jax.Array, num_new: int) -> None:
  """Raises a RuntimeError unless all rows have grown by `num_new` tokens."""
  if not np.array_equal(kv_lens, np.asarray(before.kv_lens) + num_new):
    raise RuntimeError(f"the lengths are wrong: {kv_lens}")


def verify(
  before: PageTable, after: PageTable | Stacked | Bitmap, num_new: int
) -> None:
  """Checks rows that have grown by `num_new` tokens each, with NumPy.

  Raises:
    RuntimeError: If lengths or numbers of pages are wrong, an old page of a row
      has changed, a page is used twice, or a page is neither free nor used.
  """
  verify_lens(before, after.kv_lens, num_new)
  num_pages, page_size = before.num_pages, before.page_size
  old, entries = np.asarray(before.page_indices), np.asarray(after.page_indices)
  lens = np.asarray(before.kv_lens) + num_new
  used = np.arange(old.shape[1])[None] * page_size < lens[:, None]
  times = np.bincount(entries[used], minlength=num_pages)
  right = {
    "entries": np.array_equal(entries < num_pages, used),
    "old pages": np.array_equal(entries[old < num_pages], old[old < num_pages]),
    "distinct pages": times.max() <= 1 and len(times) <= num_pages + 1,
    "free pages": np.array_equal(times[:num_pages] == 0, free_mask(after)),
  }
  wrong = [name for name, is_right in right.items() if not is_right]
  if wrong:
    raise RuntimeError(f"{type(after).__name__} has wrong {', '.join(wrong)}.")
