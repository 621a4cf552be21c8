"""PagedAttention for JAX: one pool of pages, an immutable table, a kernel."""

from paged_jax import page_table
from paged_jax.kv import pool as kv_pool
from paged_jax.kv.pool import KVPool
from paged_jax.ops.attention import paged_attention, ragged_paged_attention
from paged_jax.ops.cascade import cascade_attention, merge_attention
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
