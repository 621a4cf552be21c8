"""Checks the arguments of requests, and makes indices safe to use.

A negative index counts from the end in a gather or a scatter, and an index past
the end gives nothing. So `-1` would be the last row or page, where a caller
means none.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def integers(value: Array | int, shape: tuple[int, ...], name: str) -> Array:
  """Returns `value` as i32, after checking its shape and dtype.

  Args:
    value: An integer or an array of any integer dtype. Numbers outside the
      range of i32 are clipped.
    shape: The expected shape.
    name: Name of the argument, for error messages.

  Raises:
    ValueError: If `value` has another shape or dtype.
  """
  # A cast would wrap around; the clipped ends are out of every valid range.
  if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    value = np.clip(value, -(2**31), 2**31 - 1).astype(np.int32)
  array = jnp.asarray(value)
  if array.dtype in (jnp.int64, jnp.uint64, jnp.uint32):
    array = jnp.clip(array, max=2**31 - 1)
  if array.dtype == jnp.int64:
    array = jnp.clip(array, -(2**31))
  if array.shape != shape:
    raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {array.dtype}.")
  return array.astype(jnp.int32)


def check_rows(rows: Array, num_seqs: int) -> None:
  """Raises a ValueError if `rows` is not bool[num_seqs]."""
  dtype, shape = jnp.result_type(rows), jnp.shape(rows)
  if shape != (num_seqs,) or dtype != jnp.bool_:
    raise ValueError(f"rows must be bool[{num_seqs}], got {dtype}{shape}.")


def is_first(rows: Array, asks: Array) -> Array:
  """Returns bool[k], False where an earlier request is for the same row.

  Args:
    rows: i32[k], row of each request.
    asks: bool[k], False for no request.
  """
  entry = jnp.arange(rows.shape[0], dtype=jnp.int32)
  earlier = entry[:, None] > entry[None]
  same = (rows[:, None] == rows[None]) & asks[None]
  return ~jnp.any(earlier & same, axis=1)


def or_none(indices: Array, size: int) -> Array:
  """Returns `indices`, with `size` for those outside `[0, size)`."""
  return jnp.where((indices >= 0) & (indices < size), indices, size)
