"""The paged keys and values that attention reads, as one pytree.

Imports no Pallas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import ArrayOrRef


class KVArrays(NamedTuple):
  """K or V, with the page and layer axes of the pool merged into the first."""

  pages: ArrayOrRef  # [rows, num_kv_heads, page_size, head_dim]
  scales: ArrayOrRef | None  # f32[rows, num_kv_heads, page_size]


class PagedKV(NamedTuple):
  """The pool of all layers, the layer to read, and the page table.

  Kernels reshape the pool so that layer `l` of page `p` is row
  `p * num_layers + l`. No layer is ever sliced out of the pool, and all layers
  read the same page table.
  """

  k: jax.Array  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  v: jax.Array  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]
  # f32[num_pages, num_layers, num_kv_heads, page_size]; None: not quantised.
  k_scales: jax.Array | None
  v_scales: jax.Array | None
  layer: jax.Array | None  # i32[], in [0, num_layers); None: one layer only
  kv_lens: jax.Array  # i32[num_seqs]: stored tokens
  # i32[num_seqs, pages_per_seq]; entries outside [0, num_pages) are unmapped.
  page_indices: jax.Array

  @property
  def num_pages(self) -> int:
    """Number of pages in the pool."""
    return self.k.shape[0]

  @property
  def num_layers(self) -> int:
    """Number of layers that share the page table."""
    return self.k.shape[1]

  @property
  def num_kv_heads(self) -> int:
    """Number of KV heads."""
    return self.k.shape[2]

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self.k.shape[3]

  @property
  def num_seqs(self) -> int:
    """Rows of the page table."""
    return self.page_indices.shape[0]

  @property
  def pages_per_seq(self) -> int:
    """Columns of the page table."""
    return self.page_indices.shape[1]

  def with_layer_axis(self) -> "PagedKV":
    """Returns self, with a layer axis of size 1 inserted if K and V have none.

    Without a layer axis, K and V are [num_pages, num_kv_heads, page_size,
    head_dim].
    """
    if self.k.ndim == 5:
      return self
    expand = lambda x: None if x is None else x[:, None]
    return self._replace(
      k=self.k[:, None],
      v=self.v[:, None],
      k_scales=expand(self.k_scales),
      v_scales=expand(self.v_scales),
      layer=None,
    )

  def flat(self) -> tuple[KVArrays, KVArrays]:
    """Returns K and V with the page and layer axes merged; copies no data."""
    flatten = lambda x: x.reshape(-1, *x.shape[2:])
    k_scales = v_scales = None
    if self.k_scales is not None and self.v_scales is not None:
      k_scales, v_scales = flatten(self.k_scales), flatten(self.v_scales)
    return (
      KVArrays(flatten(self.k), k_scales),
      KVArrays(flatten(self.v), v_scales),
    )

  def layer_operand(self) -> jax.Array | None:
    """Returns the layer as a kernel operand, i32[1]; None for one layer."""
    if self.num_layers == 1:
      return None
    return jnp.asarray(self.layer, jnp.int32).reshape(1)
