"""Makes a pool smaller or larger.

All pages have one size and any of them serves any row, so a pool has no
external fragmentation and compacting it makes no room for more tokens. It
serves to give memory back to the device: once the pages in use have the lowest
numbers, the pool can be cut.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged_jax.page_table._append import PageCopies
from paged_jax.page_table._check import checked
from paged_jax.page_table._state import Changed, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compacted:
  """Result of `compact`."""

  table: PageTable
  copies: PageCopies  # num_copies = min(max_copies, num_pages // 2), at least 1


@checked
def compact(table: PageTable, max_copies: int | None = None) -> Compacted:
  """Moves the pages in use with the highest numbers to the lowest free ones.

  Holds move with their pages: a prefix cache must rename `copies.src` to
  `copies.dst` in its index. `append` then takes the free pages with the lowest
  numbers first.

  Args:
    table: The current table.
    max_copies: Maximum number of pages to move in this call, at least 1;
      further calls move the rest. If None, all are moved.

  Returns:
    The next table, and the copies to carry out with
    `paged_jax.kv.pool.copy_pages`.

  Raises:
    ValueError: If `max_copies` is below 1.
  """
  if max_copies is not None and max_copies < 1:
    raise ValueError(f"{max_copies=} must be at least 1.")
  num_pages = table.num_pages
  # With n pages in use, as many of them are at n or above as are free below n.
  size = num_pages // 2 if max_copies is None else max_copies
  size = max(1, min(size, num_pages // 2))
  page = jnp.arange(num_pages, dtype=jnp.int32)
  is_used = table.ref_counts > 0
  mark = num_pages - table.num_free
  gaps, strays = ~is_used & (page < mark), is_used & (page >= mark)
  (dst,) = jnp.nonzero(gaps, size=size, fill_value=num_pages)
  (from_top,) = jnp.nonzero(strays[::-1], size=size, fill_value=-1)
  dst = dst.astype(jnp.int32)
  src = num_pages - 1 - from_top.astype(jnp.int32)

  renamed = jnp.arange(num_pages + 1, dtype=jnp.int32).at[src].set(dst)
  counts = _move(table.ref_counts, src, dst)
  table = dataclasses.replace(
    table,
    page_indices=renamed[table.page_indices],
    ref_counts=counts,
    holds=_move(table.holds, src, dst),
    free_pages=_free_stack(counts),
  )
  return Compacted(table=table, copies=PageCopies(src=src, dst=dst))


@checked
def resize(table: PageTable, num_pages: int) -> Changed:
  """Changes the number of pages of the table; see also `kv.pool.resize`.

  Args:
    table: The current table; do not donate it.
    num_pages: The new number of pages, at least 1.

  Returns:
    A table of `num_pages` pages, and `ok` bool[]: False if a page in use is at
    `num_pages` or above. The returned table is then empty: continue with the
    old one, and retry after `compact` or once fewer pages are in use.

  Raises:
    ValueError: If `num_pages` is below 1.
  """
  if num_pages < 1:
    raise ValueError(f"{num_pages=} must be at least 1.")
  before = table.num_pages
  kept = min(before, num_pages)
  ok = jnp.all(table.ref_counts[kept:] == 0)
  is_mapped = ok & (table.page_indices < kept)
  grown = (0, num_pages - kept)
  counts = jnp.where(ok, jnp.pad(table.ref_counts[:kept], grown), 0)
  return Changed(
    table=dataclasses.replace(
      table,
      page_indices=jnp.where(is_mapped, table.page_indices, num_pages),
      kv_lens=jnp.where(ok, table.kv_lens, 0),
      min_lens=jnp.where(ok, table.min_lens, 0),
      ref_counts=counts,
      holds=jnp.where(ok, jnp.pad(table.holds[:kept], grown), 0),
      free_pages=_free_stack(counts),
      num_free=jnp.sum(counts == 0, dtype=jnp.int32),
    ),
    ok=ok,
  )


def _move(values: Array, src: Array, dst: Array) -> Array:
  """Returns `values` with the entries at `src` moved to `dst`, leaving 0."""
  moved = values.at[src].get(mode="fill", fill_value=0)
  values = values.at[dst].set(moved, mode="drop")
  return values.at[src].set(0, mode="drop")


def _free_stack(counts: Array) -> Array:
  """Returns the stack of all pages with count 0, the lowest number on top."""
  (from_top,) = jnp.nonzero(
    counts[::-1] == 0, size=counts.shape[0], fill_value=counts.shape[0] - 1
  )
  return counts.shape[0] - 1 - from_top.astype(jnp.int32)
