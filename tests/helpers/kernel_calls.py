"""Calls kernels with the arguments and keywords of the public ops."""

from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec

_STATIC = ("config", "interpret", "max_q_len")


def call(
  kernel,
  q,
  k_pages,
  v_pages,
  kv_lens,
  page_indices,
  *offsets,
  k_scales=None,
  v_scales=None,
  sinks=None,
  alibi_slopes=None,
  tree_mask=None,
  **options,
):
  """Returns output and LSE of a kernel.

  `offsets` are `cu_q_lens` and `num_active` of the ragged kernels. Options that
  the kernel has no argument for go into `AttentionSpec`.
  """
  kv = PagedKV(
    k_pages, v_pages, k_scales, v_scales, None, kv_lens, page_indices
  )
  static = {name: options.pop(name) for name in _STATIC if name in options}
  return kernel(
    q,
    kv.with_layer_axis(),
    *offsets,
    AttentionArrays(sinks, alibi_slopes, tree_mask),
    spec=AttentionSpec(**options),
    **static,
  )
