"""PagedAttention (Kwon et al., 2023) for JAX on NVIDIA GPUs.

The KV cache of all sequences lives in one pool of fixed-size pages. An
immutable `PageTable` maps each sequence to its pages, and attention ops read K
and V through it: in Pallas kernels on Hopper GPUs, in plain JAX elsewhere.

Importing this package imports neither Pallas nor Flax: each kernel is imported
when an op first uses it.
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
