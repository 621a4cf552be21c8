"""Statistics of the use of pages."""

import dataclasses

import jax
import jax.numpy as jnp

from paged_jax.page_table._quota import tenant_pages
from paged_jax.page_table._state import PageTable, mapped
from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
  """Statistics of a page table, as scalar arrays except for `tenant_pages`."""

  pages_used: Leaf  # i32
  pages_free: Leaf  # i32
  pages_shared: Leaf  # i32, referenced by more than one row
  pages_held: Leaf  # i32, held by a prefix cache
  live_seqs: Leaf  # i32, rows that are not empty
  # Unused slots in pages that rows reference. If rows fill a shared page to
  # different lengths, the longest counts.
  waste_tokens: Leaf  # i32
  waste_percent: Leaf  # f32, of all slots in pages that rows reference
  utilisation: Leaf  # f32, fraction of pages that are used
  sharing: Leaf  # f32, mean rows per page that rows reference; 1 if none
  # Pages of a buffer of max_len tokens for each live row, minus pages_used.
  pages_saved: Leaf  # i32
  bytes_saved: Leaf  # f32, pages_saved * page_bytes
  tenant_pages: Leaf | None  # i32[num_tenants]; None without quotas


def stats(table: PageTable, page_bytes: int = 0) -> Stats:
  """Returns statistics of the table. Works inside jit.

  Args:
    table: The table; it is not changed.
    page_bytes: Bytes of a page (see `paged_jax.kv.layout.KVLayout`), used for
      `bytes_saved`.
  """
  page_size = table.page_size
  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  fill = table.kv_lens[:, None] - column[None] * page_size
  fill = jnp.clip(fill, 0, page_size)
  nothing = jnp.zeros_like(table.ref_counts)
  entries = table.page_indices
  filled = nothing.at[entries].max(fill, mode="drop")
  references = table.ref_counts - table.holds
  num_referenced = _count(references > 0)
  waste = num_referenced * page_size - jnp.sum(filled, dtype=jnp.int32)
  used = table.num_pages - table.num_free
  live = _count(table.kv_lens > 0)
  saved = live * table.pages_per_seq - used
  return Stats(
    pages_used=used,
    pages_free=table.num_free,
    pages_shared=_count(references > 1),
    pages_held=_count(table.holds > 0),
    live_seqs=live,
    waste_tokens=waste,
    waste_percent=100 * _ratio(waste, num_referenced * page_size, 0.0),
    utilisation=_ratio(used, jnp.asarray(table.num_pages), 0.0),
    sharing=_ratio(_count(mapped(table)), num_referenced, 1.0),
    pages_saved=saved,
    bytes_saved=saved.astype(jnp.float32) * float(page_bytes),
    tenant_pages=tenant_pages(table),
  )


def _count(marked: jax.Array) -> jax.Array:
  return jnp.sum(marked, dtype=jnp.int32)


def _ratio(part: jax.Array, whole: jax.Array, otherwise: float) -> jax.Array:
  """Returns `part / whole` as f32, or `otherwise` where `whole` is 0."""
  divisor = jnp.maximum(whole, 1).astype(jnp.float32)
  return jnp.where(whole > 0, part.astype(jnp.float32) / divisor, otherwise)
