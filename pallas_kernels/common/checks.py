"""Checks that K, V and their scales match. Imports no Pallas."""

import jax.numpy as jnp

from pallas_kernels.common.limits import is_quantised
from pallas_kernels.common.paged_kv import PagedKV


def check_pages(kv: PagedKV) -> None:
  """Checks that K, V and their scales match.

  Args:
    kv: The paged keys and values.

  Raises:
    ValueError: If K and V differ in shape or dtype, or `check_scales` raises.
  """
  if (kv.k.dtype, kv.k.shape) != (kv.v.dtype, kv.v.shape):
    raise ValueError(
      f"k_pages is {kv.k.dtype}{kv.k.shape}, v_pages is "
      f"{kv.v.dtype}{kv.v.shape}: they must match."
    )
  check_scales(kv.k, k_scales=kv.k_scales, v_scales=kv.v_scales)


def check_scales(k_pages, *, k_scales, v_scales) -> None:
  """Checks that the scales match the pages.

  Args:
    k_pages: Pages of keys; the pages of values have the same shape and dtype.
    k_scales: Scales of keys, or None.
    v_scales: Scales of values, or None.

  Raises:
    ValueError: If quantised pages lack scales, other pages have scales, or the
      scales have a wrong dtype or shape.
  """
  needed = is_quantised(k_pages.dtype)
  for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
    if (scales is not None) != needed:
      raise ValueError(
        f"{name} must be {'an array' if needed else 'None'} for "
        f"{k_pages.dtype=}."
      )
    if scales is None:
      continue
    if scales.dtype != jnp.float32:
      raise ValueError(f"{name}.dtype={scales.dtype} must be float32.")
    if scales.shape != k_pages.shape[:-1]:
      raise ValueError(
        f"{name}.shape={scales.shape} must be {k_pages.shape[:-1]}: that of "
        "the pages without head_dim."
      )
