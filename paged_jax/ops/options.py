"""Checks the options of the public ops, and packs them into two values.

The values are the `AttentionSpec` and `AttentionArrays` of
`pallas_kernels.common.spec`.
"""

import jax.numpy as jnp
from jax import Array

from paged_jax.ops import checks
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec


def make_spec(head_dim: int, scale: float | None, **options) -> AttentionSpec:
  """Returns the static options; the default scale if `scale` is None.

  Raises:
    ValueError: If an option is out of its range.
  """
  if scale is None:
    scale = head_dim**-0.5
  return AttentionSpec(scale=scale, **options)


def check_arrays(
  arrays: AttentionArrays, q: Array, spec: AttentionSpec
) -> None:
  """Raises a ValueError if an array does not fit the queries or the options."""
  per_head = dict(sinks=arrays.sinks, alibi_slopes=arrays.alibi_slopes)
  given = {name: x for name, x in per_head.items() if x is not None}
  checks.check_per_head(q, **given)
  if arrays.tree_mask is not None:
    _check_tree_mask(arrays.tree_mask, q, spec, arrays.alibi_slopes)


def _check_tree_mask(
  tree_mask: Array, q: Array, spec: AttentionSpec, alibi_slopes: Array | None
) -> None:
  if not spec.causal:
    raise ValueError("tree_mask must be None with causal=False.")
  if alibi_slopes is not None:
    raise ValueError(
      "alibi_slopes must be None with a tree_mask: the positions of keys are "
      "not distances along a path of the tree."
    )
  checks.check_are_arrays(tree_mask=tree_mask)
  shape = jnp.shape(tree_mask)
  if tree_mask.dtype != jnp.bool_:
    raise ValueError(f"tree_mask.dtype={tree_mask.dtype} must be bool.")
  if len(shape) != 2 or shape[0] != q.shape[0] or shape[1] < 1:
    raise ValueError(
      f"tree_mask.shape={shape} must be ({q.shape[0]}, max_new): num_tokens "
      "rows and at least one column."
    )
