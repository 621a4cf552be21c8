"""What kernels ask of pages and of their scales."""

import jax.numpy as jnp

from pallas_kernels.decode_config import is_quantised


def check_pages(k_pages, v_pages, k_scales, v_scales):
  """Raises a ValueError if pages and scales do not go together."""
  if (k_pages.dtype, k_pages.shape) != (v_pages.dtype, v_pages.shape):
    raise ValueError(
      f"{k_pages.dtype}{k_pages.shape} and {v_pages.dtype}{v_pages.shape}, of "
      "k_pages and v_pages, must be the same."
    )
  wanted = is_quantised(k_pages.dtype)
  for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
    if (x is not None) != wanted:
      raise ValueError(
        f"{name} must{' not' * (not wanted)} be given with {k_pages.dtype=}."
      )
    if x is not None and (x.dtype, x.shape) != (
      jnp.float32,
      k_pages.shape[:-1],
    ):
      raise ValueError(
        f"{name} is {x.dtype}{x.shape} and must be float32{k_pages.shape[:-1]}."
      )
