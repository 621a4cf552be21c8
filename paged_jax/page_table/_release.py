"""Shortens and empties rows, and releases their pages."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table import arguments
from paged_jax.page_table._check import checked
from paged_jax.page_table._requests import requested
from paged_jax.page_table._stack import remove_references
from paged_jax.page_table._state import (
  Changed,
  PageTable,
  mapped,
  pages_for,
)


@checked
def release(table: PageTable, rows: Bool[Array, " num_seqs"]) -> PageTable:
  """Empties rows and frees every page that no other row references or holds.

  Releasing an empty row changes nothing.

  Args:
    table: The current table.
    rows: bool[num_seqs], True for rows to empty.

  Returns:
    The next table.

  Raises:
    ValueError: If `rows` is not bool[num_seqs].
  """
  arguments.check_rows(rows, table.num_seqs)
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
  """Shortens rows, for example to remove rejected speculative tokens.

  Pages past the new length are released.

  Args:
    table: The current table.
    seq: i32[k] or i32[], rows; `num_seqs` for no request.
    new_len: Tokens to keep of each row, in the shape of `seq`.

  Returns:
    The next table, and `ok` in the shape of `seq`: False if the row is out of
    range or given earlier in the call, or if `new_len` is negative, above the
    row's length, or below its `min_lens`: the window of the row's last token
    would then include pages that `release_outside_window` released. A refused
    row stays as it was.

  Raises:
    ValueError: If `seq` or `new_len` is not an integer array, or if their
      shapes differ.
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
  table = remove_references(table, leaving.reshape(-1))
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
  """Releases the pages that a sliding window has passed.

  A query at position `p` sees the keys in `(p - window, p]` and the first
  `num_sink_tokens` keys (StreamingLLM, Xiao et al., 2023). A page is released
  once neither the row's last token nor any later token can see a key in it. Its
  entry becomes a hole, `num_pages`, which the attention ops skip. A row then
  maps at most `pages_for(window) + 1` pages and those of the sink tokens.

  Call it after the tokens of the step have attended: the first of several new
  tokens sees further back than the last. Verify speculative tokens before the
  call: afterwards, a row cannot be truncated below `min_lens`, where the window
  of its last token would be incomplete.

  Args:
    table: The current table.
    window: Keys that a query sees, its own included, at least 1. An array is
      clamped to `[1, max_len]`.
    num_sink_tokens: First tokens that stay visible, at least 0. An array is
      clamped.

  Returns:
    The next table.

  Raises:
    ValueError: If `window` or `num_sink_tokens` is a Python integer out of its
      range, or is neither an integer nor an i32[] array.
  """
  if isinstance(window, int) and window < 1:
    raise ValueError(f"{window=} must be at least 1.")
  if isinstance(num_sink_tokens, int) and num_sink_tokens < 0:
    raise ValueError(f"{num_sink_tokens=} must be at least 0.")
  window = jnp.clip(arguments.integers(window, (), "window"), 1, table.max_len)
  sinks = jnp.maximum(
    arguments.integers(num_sink_tokens, (), "num_sink_tokens"), 0
  )
  num_passed = jnp.maximum(table.kv_lens - window, 0) // table.page_size
  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  leaving = (column[None] < num_passed[:, None]) & mapped(table)
  leaving &= (column * table.page_size >= sinks)[None]
  min_lens = num_passed * table.page_size + window
  min_lens = jnp.where(jnp.any(leaving, axis=1), min_lens, 0)
  table = _unmap(table, leaving)
  return dataclasses.replace(
    table, min_lens=jnp.maximum(table.min_lens, min_lens)
  )


def freed_pages(
  before: PageTable, after: PageTable, size: int
) -> Int[Array, " size"]:
  """Returns the pages that are in use in `before` and free in `after`.

  Args:
    before: A table.
    after: A later table, with the same number of pages.
    size: Length of the result; further pages are left out.

  Returns:
    i32[size], for `paged_jax.kv.pool.zero_pages`, padded with `num_pages`.

  Raises:
    ValueError: If the tables have different numbers of pages.
  """
  if before.num_pages != after.num_pages:
    raise ValueError(
      f"before has {before.num_pages} pages, after has {after.num_pages}: "
      "they must be equal."
    )
  freed = (before.ref_counts > 0) & (after.ref_counts == 0)
  (pages,) = jnp.nonzero(freed, size=size, fill_value=before.num_pages)
  return pages.astype(jnp.int32)


def _unmap(table: PageTable, entries: Array) -> PageTable:
  """Unmaps the marked entries and releases their pages."""
  nothing = table.num_pages
  leaving = jnp.where(entries, table.page_indices, nothing)
  table = remove_references(table, leaving.reshape(-1))
  kept = jnp.where(entries, nothing, table.page_indices)
  return dataclasses.replace(table, page_indices=kept)
