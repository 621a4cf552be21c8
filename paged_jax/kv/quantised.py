"""Quantises keys and values to 8 bits, with one scale for each row.

A row is the head_dim elements of one token and KV head:

  scale = max(abs(x)) / largest number of the dtype,    x ~ data * scale

Rows are independent: writing a token changes no other token's scale.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Real


def quantise(
  x: Float[Array, "*rows head_dim"], dtype: DTypeLike
) -> tuple[Real[Array, "*rows head_dim"], Float32[Array, "*rows"]]:
  """Returns the data and the scales of rows.

  Args:
    x: [..., head_dim], any float dtype.
    dtype: int8 or float8_e4m3fn.

  Returns:
    Data [..., head_dim] in `dtype` and scales f32[...]: `data * scale` is `x`,
    rounded. A row of zeros has scale 0. A row with NaN or Inf has scale NaN, so
    that all of its values come back as NaN.
  """
  is_int = jnp.issubdtype(dtype, jnp.integer)
  largest = np.float32((jnp.iinfo if is_int else jnp.finfo)(dtype).max)
  x = x.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(x), axis=-1)
  finite = jnp.isfinite(absmax)
  info = np.finfo(np.float32)
  # Scales are at least the smallest normal number, because devices flush
  # subnormal ones to 0, and so small that `largest * scale` is finite.
  top = np.nextafter(info.max / largest, np.float32(0))
  scales = jnp.clip(absmax / largest, info.tiny, top)
  usable = finite & (absmax > 0)
  data = x / jnp.where(usable, scales, 1.0)[..., None]
  data = jnp.where(finite[..., None], data, 0.0)
  if is_int:
    data = jnp.round(data)
  # Rounding may raise a quotient above the largest number.
  data = jnp.clip(data, -largest, largest).astype(dtype)
  return data, jnp.where(usable, scales, jnp.where(finite, 0.0, jnp.nan))


def move(move_pages: Callable[..., Array], *arrays: Array) -> Array:
  """Returns `move_pages(*arrays)`, which gathers, scatters or copies.

  On CPU, XLA has no such operation for float8: it would widen every operand,
  the whole pool included, to float16. So the pages are reinterpreted as uint8
  there. A gather then makes no copy of the pool; a write still makes one.
  """
  float8 = jnp.dtype(jnp.float8_e4m3fn)
  if arrays[0].dtype != float8:
    return move_pages(*arrays)

  def on_cpu(*arrays: Array) -> Array:
    # The barrier keeps the cast next to the operation: in a loop, XLA would
    # otherwise copy the whole pool to cast it.
    arrays = lax.optimization_barrier(arrays)
    bits = [
      lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == float8 else x
      for x in arrays
    ]
    return lax.bitcast_convert_type(move_pages(*bits), float8)

  return lax.platform_dependent(*arrays, cpu=on_cpu, default=move_pages)
