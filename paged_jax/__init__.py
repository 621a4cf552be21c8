"""PagedAttention for JAX: a pool of pages, an immutable table, GPU kernels.

Imports neither Pallas nor Flax: a kernel is imported where it is first used.
"""

from paged_jax import page_table
from paged_jax.generation import generate
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.config import CacheConfig
from paged_jax.kv.layout import LayerKV
from paged_jax.kv.step import begin_padded, begin_step
from paged_jax.ops.attention import paged_attention, ragged_paged_attention
from paged_jax.ops.cascade import cascade_attention
from paged_jax.ops.layer import attend_layer
from paged_jax.ops.merge import merge_attention
from paged_jax.page_table import PageTable

__version__ = "0.2.0"

__all__ = [
  "CacheConfig",
  "LayerKV",
  "PageTable",
  "PagedCache",
  "attend_layer",
  "begin_padded",
  "begin_step",
  "cascade_attention",
  "generate",
  "merge_attention",
  "page_table",
  "paged_attention",
  "ragged_paged_attention",
]
