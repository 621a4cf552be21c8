"""Lets rows and prefix caches share pages."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.page_table import _quota, arguments
from paged_jax.page_table._check import checked
from paged_jax.page_table._requests import requested
from paged_jax.page_table._stack import add_references, remove_references
from paged_jax.page_table._state import (
  Changed,
  PageTable,
  pages_for,
)


@checked
def fork(
  table: PageTable,
  src: Int[Array, "*num_forks"] | int,
  dst: Int[Array, "*num_forks"] | int,
) -> Changed:
  """Makes empty rows copies of other rows without copying a page.

  The rows share all pages, including a partly filled last page: before the
  first of them writes to it, `append` asks for a copy. Forks read the rows as
  they were before the call. A fork of an empty row is `ok`, and its `dst` stays
  empty.

  Args:
    table: The current table.
    src: i32[num_forks] or i32[], rows to copy; `num_seqs` for no request.
    dst: Rows to fill, in the shape of `src`; `num_seqs` for no request. They
      keep their tenants.

  Returns:
    The next table, and `ok` in the shape of `src`: False if a row is out of
    range, if `dst` is not empty or given earlier in the call, or if a quota
    does not allow the fork. Quotas are applied in array order: after the first
    fork of a tenant that exceeds its quota, no later one that needs pages is
    served. A refused `dst` stays as it was.

  Raises:
    ValueError: If `src` or `dst` is not an integer array, or if their shapes
      differ.
  """
  shape = jnp.shape(src)
  src = arguments.integers(src, shape, "src").reshape(-1)
  if jnp.shape(dst) != shape:
    raise ValueError(f"dst must have shape {shape}, got {jnp.shape(dst)}.")
  requests = requested(table, dst, "dst", also=src != table.num_seqs)
  dst = requests.rows
  done = requests.valid & (src >= 0) & (src < table.num_seqs)
  done &= _is_empty(table, dst)

  entries = table.page_indices.at[src].get(mode="clip")
  need = jnp.sum(entries < table.num_pages, axis=1, dtype=jnp.int32)
  need = jnp.where(done, need, 0)
  owner = table.tenants.at[dst].get(mode="clip")
  done &= _quota.allows_in_turn(table, owner, need)

  lens = table.kv_lens.at[src].get(mode="clip")
  min_lens = table.min_lens.at[src].get(mode="clip")
  table = _start(table, done, dst, entries, lens, min_lens)
  return requests.result(table, done)


@checked
def permute(table: PageTable, parents: Int[Array, " num_seqs"]) -> Changed:
  """Replaces every row by a fork of an old row, as a beam search does.

  No page is copied. An old row without forks releases the pages that only it
  references. Rows keep their tenants.

  Args:
    table: The current table.
    parents: i32[num_seqs], the old row that each row becomes; `num_seqs` for an
      empty row.

  Returns:
    The next table, and `ok` bool[]. If `ok` is False, nothing has changed: a
    parent is out of range, or a tenant would use more pages than before and
    more than its quota.

  Raises:
    ValueError: If `parents` is not an integer array of shape [num_seqs].
  """
  num_seqs = table.num_seqs
  parents = arguments.integers(parents, (num_seqs,), "parents")
  ok = jnp.all((parents >= 0) & (parents <= num_seqs))
  if table.quotas is not None:
    uses, would_use = (
      _quota.pages_of_tenants(each, table.num_tenants)
      for each in (table, _reordered(table, parents))
    )
    ok &= jnp.all((would_use <= uses) | (would_use <= table.quotas))
  itself = jnp.arange(num_seqs, dtype=jnp.int32)
  after = _reordered(table, jnp.where(ok, parents, itself))
  # New references are added before old ones are removed, so that no page that
  # stays in use becomes free in between.
  counts = add_references(table, after.page_indices)
  after = remove_references(
    dataclasses.replace(after, ref_counts=counts),
    table.page_indices.reshape(-1),
  )
  return Changed(table=after, ok=ok)


@checked
def adopt(
  table: PageTable,
  seq: Int[Array, "*k"] | int,
  pages: Int[Array, "*k pages_per_seq"],
  kv_len: Int[Array, "*k"] | int,
  min_len: Int[Array, "*k"] | int = 0,
) -> Changed:
  """Starts empty rows with pages that are in use: a prefix cache hit.

  With a sliding window, `pages` needs only the pages of the last window and of
  the sink tokens: give `min_len = first * page_size + window` if all pages from
  column `first` on are present.

  Args:
    table: The current table.
    seq: i32[k] or i32[], rows; `num_seqs` for no request.
    pages: i32[k, pages_per_seq] or i32[pages_per_seq], the pages of the first
      `kv_len` tokens, in order, then `num_pages`.
    kv_len: Number of tokens in the pages, in the shape of `seq`.
    min_len: In the shape of `seq` or i32[], in `[0, kv_len]`. Pages that end
      below it may be holes, `num_pages`. A row with holes cannot be truncated
      below it.

  Returns:
    The next table, and `ok` in the shape of `seq`: False if the row is out of
    range, not empty or given earlier in the call; if the number of `pages` is
    not what `kv_len` tokens need, or if a page is free, out of range or given
    twice for the row; if `kv_len` or `min_len` is out of range; or if a quota
    does not allow it (see `fork`). A refused row stays as it was.

  Raises:
    ValueError: If an argument has the wrong shape or is not an integer array.
  """
  requests, width = requested(table, seq, "seq"), table.pages_per_seq
  row, shape = requests.rows, requests.shape
  entries = arguments.integers(pages, (*shape, width), "pages").reshape(
    -1, width
  )
  lens = requests.flat(kv_len, "kv_len")
  min_lens = arguments.integers(min_len, jnp.shape(min_len), "min_len")
  if min_lens.shape not in ((), shape):
    raise ValueError(f"min_len must have shape {shape}, got {min_lens.shape}.")
  min_lens = jnp.broadcast_to(min_lens.reshape(-1), lens.shape)
  done = requests.valid & _is_empty(table, row)
  done &= (lens >= 0) & (lens <= table.max_len)
  done &= (min_lens >= 0) & (min_lens <= lens)

  column = jnp.arange(width, dtype=jnp.int32)
  num_used = jnp.where(done, pages_for(lens, table.page_size), 0)
  is_used = column[None] < num_used[:, None]
  is_hole = entries == table.num_pages
  is_passed = (column[None] + 1) * table.page_size < min_lens[:, None]
  may_be_hole = ~is_used | is_passed
  fits = (is_hole & may_be_hole) | (is_used & _is_used(table, entries))
  in_order = jnp.sort(entries, axis=1)
  twice = in_order[:, 1:] == in_order[:, :-1]
  twice &= in_order[:, 1:] < table.num_pages
  done &= jnp.all(fits, axis=1) & ~jnp.any(twice, axis=1)
  is_referenced = is_used & ~is_hole & done[:, None]
  need = jnp.sum(is_referenced, axis=1, dtype=jnp.int32)
  owner = table.tenants.at[row].get(mode="clip")
  done &= _quota.allows_in_turn(table, owner, need)
  min_lens = jnp.where(jnp.any(is_used & is_hole, axis=1), min_lens, 0)
  table = _start(table, done, row, entries, lens, min_lens)
  return requests.result(table, done)


@checked
def hold(table: PageTable, pages: Int[Array, " k"]) -> Changed:
  """Adds a prefix cache's reference to pages, which outlives their rows.

  Holds are counted: a page that is held twice must be dropped twice.

  Args:
    table: The current table.
    pages: i32[k], pages in use; `num_pages` for no request.

  Returns:
    The next table, and `ok` bool[k]: False for pages that are free or out of
    range, which stay as they were.

  Raises:
    ValueError: If `pages` is not a 1-D integer array.
  """
  pages = arguments.integers(pages, (jnp.size(pages),), "pages")
  asks = pages != table.num_pages
  done = _is_used(table, pages)
  held = jnp.where(done, pages, table.num_pages)
  table = dataclasses.replace(
    table,
    ref_counts=add_references(table, held),
    holds=table.holds.at[held].add(1, mode="drop"),
  )
  return Changed(table=table, ok=done | ~asks)


@checked
def drop(table: PageTable, pages: Int[Array, " k"]) -> Changed:
  """Removes a prefix cache's reference to pages, added by `hold`.

  Pages that no row references and nothing else holds become free.

  Args:
    table: The current table.
    pages: i32[k], held pages; `num_pages` for no request.

  Returns:
    The next table, and `ok` bool[k]: False for pages that are out of range, or
    whose holds are used up by earlier entries of `pages`.

  Raises:
    ValueError: If `pages` is not a 1-D integer array.
  """
  pages = arguments.integers(pages, (jnp.size(pages),), "pages")
  asks = pages != table.num_pages
  exists = (pages >= 0) & (pages < table.num_pages)
  entry = jnp.arange(pages.shape[0], dtype=jnp.int32)
  earlier = entry[:, None] > entry[None]
  same = pages[:, None] == pages[None]
  num_before = jnp.sum(same & earlier, axis=1, dtype=jnp.int32)
  done = exists & (num_before < table.holds.at[pages].get(mode="clip"))
  dropped = jnp.where(done, pages, table.num_pages)
  table = remove_references(table, dropped)
  holds = table.holds.at[dropped].add(-1, mode="drop")
  table = dataclasses.replace(table, holds=holds)
  return Changed(table=table, ok=done | ~asks)


def _is_empty(table: PageTable, rows: Array) -> Array:
  """Returns whether rows exist and are empty."""
  exists = (rows >= 0) & (rows < table.num_seqs)
  return exists & (table.kv_lens.at[rows].get(mode="clip") == 0)


def _is_used(table: PageTable, pages: Array) -> Array:
  """Returns whether pages exist and are in use."""
  exists = (pages >= 0) & (pages < table.num_pages)
  return exists & (table.ref_counts.at[pages].get(mode="clip") > 0)


def _start(
  table: PageTable,
  done: Array,
  rows: Array,
  entries: Array,
  lens: Array,
  min_lens: Array,
) -> PageTable:
  """Puts pages in use into empty rows where `done`, and counts them."""
  where = jnp.where(done, rows, table.num_seqs)
  referenced = jnp.where(done[:, None], entries, table.num_pages)
  return dataclasses.replace(
    table,
    page_indices=table.page_indices.at[where].set(referenced, mode="drop"),
    kv_lens=table.kv_lens.at[where].set(lens, mode="drop"),
    min_lens=table.min_lens.at[where].set(min_lens, mode="drop"),
    ref_counts=add_references(table, referenced),
  )


def _reordered(table: PageTable, parents: Array) -> PageTable:
  """Returns the table with its rows gathered, and the counts unchanged."""
  fill = dict(mode="fill", fill_value=0)
  entries = table.page_indices.at[parents].get(
    mode="fill", fill_value=table.num_pages
  )
  return dataclasses.replace(
    table,
    page_indices=entries,
    kv_lens=table.kv_lens.at[parents].get(**fill),
    min_lens=table.min_lens.at[parents].get(**fill),
  )
