"""Shapes and dtypes that the kernels support; memory of a Hopper GPU.

Imports no Pallas, so that machines without Mosaic GPU can import it.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SMEM_LIMIT = 232_448  # bytes of shared memory per program (CTA), at most
SM_SMEM = 233_472  # bytes of shared memory per multiprocessor
SMEM_ALLOCATION = 1024  # bytes: allocation granularity of shared memory
QUANTISED_DTYPES = ("int8", "float8_e4m3fn")  # pages with one scale per token
MAX_Q_LEN = 8  # query tokens per sequence in the decode kernel, at most


def is_quantised(dtype: DTypeLike) -> bool:
  """Returns whether pages of this dtype have scales.

  Args:
    dtype: Dtype of the pages.
  """
  return jnp.dtype(dtype).name in QUANTISED_DTYPES


def unsupported_shape(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  kv_dtype: DTypeLike,
) -> str | None:
  """Returns why no attention kernel supports these shapes, or None.

  Args:
    head_dim: Elements per head.
    page_size: Tokens per page.
    num_q_heads: Number of query heads.
    num_kv_heads: Number of KV heads.
    dtype: Dtype of the queries.
    kv_dtype: Dtype of the pages.
  """
  names = [jnp.dtype(x).name for x in (dtype, kv_dtype)]
  if names[0] not in ("bfloat16", "float16"):
    return f"dtype={names[0]} is not bfloat16 or float16."
  kv_dtypes = names[0], *QUANTISED_DTYPES
  if names[1] not in kv_dtypes:
    return (
      f"kv_dtype={names[1]} with dtype={names[0]} is not one of {kv_dtypes}."
    )
  if head_dim not in HEAD_DIMS:
    return f"{head_dim=} is not one of {HEAD_DIMS}."
  if page_size < 1 or page_size % 8:
    return f"{page_size=} is not a multiple of 8."
  if num_q_heads % num_kv_heads:
    return f"{num_q_heads=} is not a multiple of {num_kv_heads=}."
  return None
