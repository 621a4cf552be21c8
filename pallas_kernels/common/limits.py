"""Shapes and dtypes that the kernels take, and the memory of a Hopper GPU.

Imports no Pallas, so that a machine without Mosaic GPU can ask too.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SMEM_LIMIT = 232_448  # bytes of shared memory that a program may use
SM_SMEM = 233_472  # bytes of a multiprocessor, for all its programs
SMEM_ALLOCATION = 1024  # bytes: the granularity of shared memory
QUANTISED_DTYPES = ("int8", "float8_e4m3fn")  # of pages that have scales
MAX_Q_LEN = 8  # query tokens of a sequence that the decode kernel takes


def is_quantised(dtype: DTypeLike) -> bool:
  """Returns whether pages of this dtype have scales."""
  return jnp.dtype(dtype).name in QUANTISED_DTYPES


def unsupported_shape(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  kv_dtype: DTypeLike,
) -> str | None:
  """Returns why no attention kernel takes these shapes, or None.

  Args:
    head_dim: Width of a head.
    page_size: Tokens of a page.
    num_q_heads: Query heads.
    num_kv_heads: KV heads.
    dtype: Of the queries.
    kv_dtype: Of the pages.
  """
  names = [jnp.dtype(x).name for x in (dtype, kv_dtype)]
  if names[0] not in ("bfloat16", "float16"):
    return f"dtype={names[0]} is not bfloat16 or float16."
  if names[1] not in (names[0], *QUANTISED_DTYPES):
    return f"pages of {names[1]} do not take queries of {names[0]}."
  if head_dim not in HEAD_DIMS:
    return f"{head_dim=} is not one of {HEAD_DIMS}."
  if page_size < 1 or page_size % 8:
    return f"{page_size=} is not a multiple of 8."
  if num_q_heads % num_kv_heads:
    return f"{num_q_heads=} is not a multiple of {num_kv_heads=}."
  return None
