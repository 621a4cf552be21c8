"""What kernels ask of pages and of their scales."""

import jax.numpy as jnp

from pallas_kernels.decode.config import is_quantised


def check_pages(k_pages, v_pages, k_scales, v_scales) -> None:
  """Raises a ValueError if pages and scales do not go together."""
  if (k_pages.dtype, k_pages.shape) != (v_pages.dtype, v_pages.shape):
    raise ValueError(
      f"{k_pages.dtype}{k_pages.shape} and {v_pages.dtype}{v_pages.shape}, of "
      "k_pages and v_pages, must be the same."
    )
  check_scales(k_pages, k_scales=k_scales, v_scales=v_scales)


def check_scales(k_pages, *, k_scales, v_scales) -> None:
  """Raises a ValueError if scales do not go with the pages.

  Args:
    k_pages: of keys; those of values are alike.
    k_scales: an array, or None.
    v_scales: the same.
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
