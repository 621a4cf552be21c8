"""PagedAttention for JAX: a pool of pages, an immutable table, GPU kernels."""

from paged_jax import page_table
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


def __getattr__(name: str):
  # Flax is not needed for the ops and the cache: it is imported on first use.
  if name == "generate":
    from paged_jax.generation import generate

    return generate
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
