"""PagedAttention for JAX: one pool of pages, an immutable table, a kernel."""

from paged_jax import kv_pool, page_table
from paged_jax.attention import paged_attention, ragged_paged_attention
from paged_jax.cascade import cascade_attention, merge_attention
from paged_jax.kv_pool import KVPool
from paged_jax.page_table import PageTable

__all__ = [
  "KVPool",
  "PageTable",
  "cascade_attention",
  "kv_pool",
  "merge_attention",
  "page_table",
  "paged_attention",
  "ragged_paged_attention",
]
