"""Adds and removes references to pages; pages without any become free."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.page_table._state import PageTable


def remove_references(
  table: PageTable, leaving: Int[Array, " num_entries"]
) -> PageTable:
  """Removes one reference to a page for each entry of `leaving`.

  Pages whose count reaches 0 are pushed on the stack, once. The cost grows with
  the number of entries, not with the number of pages.

  Args:
    table: The table; the caller removes the entries from its rows or holds.
    leaving: i32[num_entries], pages; `num_pages` for none.
  """
  num_entries = leaving.shape[0]
  nothing = table.num_pages
  counts = table.ref_counts.at[leaving].add(-1, mode="drop")
  remaining = counts.at[leaving].get(mode="fill", fill_value=1)
  emptied = jnp.where(remaining == 0, leaving, nothing)
  # If several entries are the last references to one page, only the first
  # pushes it. To find that one, each entry writes a distinct negative number
  # into the count of its page, and the least remains.
  entry_id = jnp.arange(-num_entries, 0, dtype=jnp.int32)
  counts = counts.at[emptied].min(entry_id, mode="drop")
  pushes = counts.at[emptied].get(mode="fill", fill_value=0) == entry_id
  counts = counts.at[emptied].set(0, mode="drop")

  rank = jnp.cumsum(pushes, dtype=jnp.int32)
  index = jnp.where(pushes, table.num_free + rank - 1, nothing)
  return dataclasses.replace(
    table,
    ref_counts=counts,
    free_pages=table.free_pages.at[index].set(leaving, mode="drop"),
    num_free=table.num_free + jnp.sum(pushes, dtype=jnp.int32),
  )


def add_references(table: PageTable, pages: Array) -> Array:
  """Returns the reference counts with one added for each entry of `pages`."""
  return table.ref_counts.at[pages.reshape(-1)].add(1, mode="drop")
