"""Pools and pages that the page kernels support. Imports no Pallas."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike

MAX_TMA_ROWS = 256  # rows per TMA copy, at most; and columns
WORD = 4  # bytes per register


def unsupported_write(
  shape: tuple[int, ...], dtype: DTypeLike, num_tokens: int
) -> str | None:
  """Returns why the write kernel does not support a pool, or None.

  Args:
    shape: Shape of K or V: [num_pages, num_layers, num_kv_heads, page_size,
      head_dim].
    dtype: Dtype of K and V.
    num_tokens: Tokens to write.
  """
  row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
  if row_bytes % WORD:
    return f"rows of {row_bytes} bytes are not whole words of {WORD}."
  if math.prod(shape[:-1]) >= 2**31:
    return f"a pool of {shape} has 2**31 rows or more."
  if num_tokens * shape[2] * row_bytes >= 2**32:
    return f"{num_tokens} tokens have 4 GiB of keys or more."
  return None


def unsupported_copy(
  page_shape: tuple[int, ...], dtype: DTypeLike
) -> str | None:
  """Returns why the copy kernel does not support pages, or None.

  Args:
    page_shape: Shape of the pool without its first axis, the pages.
    dtype: Dtype of the pool.
  """
  if widest_row(math.prod(page_shape), dtype) is None:
    return (
      f"pages of {page_shape} {jnp.dtype(dtype)} cannot be cut into rows of a "
      "multiple of 16 bytes."
    )
  return None


def widest_row(num_elements: int, dtype: DTypeLike) -> int | None:
  """Returns the widest row into which TMA can cut an array; None if it cannot.

  The bytes of a row are a multiple of 16.

  Args:
    num_elements: Elements of the array, which is contiguous.
    dtype: Its dtype.
  """
  itemsize = jnp.dtype(dtype).itemsize
  fitting = (
    n
    for n in range(1, MAX_TMA_ROWS + 1)
    if num_elements % n == 0 and n * itemsize % 16 == 0
  )
  return max(fitting, default=None)
