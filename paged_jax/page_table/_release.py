"""How rows shrink and end, and where their pages go."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table._check import checked
from paged_jax.page_table._requests import requested
from paged_jax.page_table._stack import give_back
from paged_jax.page_table._state import (
  Changed,
  PageTable,
  check_rows,
  integers,
  mapped,
  pages_for,
)


@checked
def release(table: PageTable, rows: Bool[Array, " num_seqs"]) -> PageTable:
  """Empties rows and gives back every page that nobody else names or holds.

  Releasing an empty row changes nothing.

  Args:
    table: The current table.
    rows: bool[num_seqs], which rows to empty.

  Returns:
    The next table.

  Raises:
    ValueError: If `rows` has another shape or is not boolean.
  """
  check_rows(table, rows)
  table = _unmap(table, rows[:, None])
  return dataclasses.replace(
    table,
    kv_lens=jnp.where(rows, 0, table.kv_lens),
    min_lens=jnp.where(rows, 0, table.min_lens),
  )


@checked
def truncate(
  table: PageTable,
  seq: Int[Array, "*k"] | int,
  new_len: Int[Array, "*k"] | int,
) -> Changed:
  """Cuts rows to a shorter length: the undo of tokens not wanted after all.

  Pages that lie past the new length are given back.

  Args:
    table: The current table.
    seq: i32[k] or i32[], rows; `num_seqs` for nothing.
    new_len: The same shape, tokens to keep.

  Returns:
    The next table, and `ok` of the shape of `seq`: False if the row is out of
    range or named earlier in the call, if `new_len` is negative or more than
    the row has, or if it is less than `min_lens`: the window of the row's last
    token would then reach into pages that `release_outside_window` gave back.
    A refused row is left as it was.

  Raises:
    ValueError: If an argument has another shape or is not an integer.
  """
  requests = requested(table, seq, "seq")
  row, length = requests.rows, requests.flat(new_len, "new_len")
  done = requests.valid
  done &= length <= table.kv_lens.at[row].get(mode="clip")
  done &= length >= table.min_lens.at[row].get(mode="clip")  # at least 0

  where = jnp.where(done, row, table.num_seqs)
  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  past = column[None] >= pages_for(length, table.page_size)[:, None]
  entries = table.page_indices.at[row].get(mode="clip")
  leaving = jnp.where(past & done[:, None], entries, table.num_pages)
  entries = jnp.where(past, table.num_pages, entries)
  table = give_back(table, leaving.reshape(-1))
  table = dataclasses.replace(
    table,
    page_indices=table.page_indices.at[where].set(entries, mode="drop"),
    kv_lens=table.kv_lens.at[where].set(length, mode="drop"),
  )
  return requests.result(table, done)


@checked
def release_outside_window(
  table: PageTable,
  window: Int[Array, ""] | int,
  num_sink_tokens: Int[Array, ""] | int = 0,
) -> PageTable:
  """Gives back the pages that a sliding window has left behind.

  A query at position `p` sees the keys in `(p - window, p]`, and the first
  `num_sink_tokens` (StreamingLLM, https://arxiv.org/abs/2309.17453). A page is
  given back when the row's last token and all that follow it see none of it.
  Its entry becomes `num_pages`, a hole, which both ops skip; a row then holds
  at most `pages_for(window) + 1` pages and those of the sinks.

  Call it when the tokens of the step have attended: the first of several new
  tokens sees further to the left than the last. A row cannot be truncated to
  where the window of its last token would not be whole (`min_lens`); so give
  speculative tokens their verdict first.

  Args:
    table: The current table.
    window: Keys that a query sees, its own included, at least 1.
    num_sink_tokens: First tokens that stay visible, at least 0.

  Returns:
    The next table.

  Raises:
    ValueError: If `window` or `num_sink_tokens` is a number out of its range.
  """
  if isinstance(window, int) and window < 1:
    raise ValueError(f"{window=} must be at least 1.")
  if isinstance(num_sink_tokens, int) and num_sink_tokens < 0:
    raise ValueError(f"{num_sink_tokens=} must be at least 0.")
  window = jnp.clip(integers(window, (), "window"), 1, table.max_len)
  sinks = jnp.maximum(integers(num_sink_tokens, (), "num_sink_tokens"), 0)
  num_left = jnp.maximum(table.kv_lens - window, 0) // table.page_size
  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  leaving = (column[None] < num_left[:, None]) & mapped(table)
  leaving &= (column * table.page_size >= sinks)[None]
  floor = num_left * table.page_size + window
  floor = jnp.where(jnp.any(leaving, axis=1), floor, 0)
  table = _unmap(table, leaving)
  return dataclasses.replace(table, min_lens=jnp.maximum(table.min_lens, floor))


def freed_pages(
  before: PageTable, after: PageTable, size: int
) -> Int[Array, " size"]:
  """Returns the pages in use in one table and free in a later one.

  Args:
    before: A table.
    after: The table some transitions later, with as many pages.
    size: Length of the result; pages that exceed it are left out.

  Returns:
    i32[size], for `kv_pool.zero_pages`; `num_pages` where there is none.

  Raises:
    ValueError: If the tables have different numbers of pages.
  """
  if before.num_pages != after.num_pages:
    raise ValueError(
      f"before has {before.num_pages} pages, after has {after.num_pages}."
    )
  freed = (before.ref_counts > 0) & (after.ref_counts == 0)
  (pages,) = jnp.nonzero(freed, size=size, fill_value=before.num_pages)
  return pages.astype(jnp.int32)


def _unmap(table: PageTable, entries: Array) -> PageTable:
  """Takes the marked entries out of their rows."""
  nothing = table.num_pages
  leaving = jnp.where(entries, table.page_indices, nothing)
  table = give_back(table, leaving.reshape(-1))
  kept = jnp.where(entries, nothing, table.page_indices)
  return dataclasses.replace(table, page_indices=kept)
