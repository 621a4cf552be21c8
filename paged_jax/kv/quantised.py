"""Quantised keys and values: narrow numbers, and one scale for each row.

A row is the head_dim numbers of one token and KV head. Its scale is the largest
magnitude in it over the largest number of the narrow dtype; data times scale is
the value. Rows are independent: writing a token changes no other token's scale.
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
  """Returns data and scales of rows; `data * scale` is `x`, rounded.

  Args:
    x: [..., head_dim], any float dtype.
    dtype: int8 or float8_e4m3fn.

  Returns:
    Data in `dtype`, and f32 scales without the last axis. A row of zeros has
    the scale 0. A row that holds NaN or Inf has the scale NaN: none of it
    comes back finite.
  """
  is_int = jnp.issubdtype(dtype, jnp.integer)
  largest = np.float32((jnp.iinfo if is_int else jnp.finfo)(dtype).max)
  x = x.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(x), axis=-1)
  finite = jnp.isfinite(absmax)
  info = np.finfo(np.float32)
  # Normal numbers, though rows may be tinier: devices flush subnormal ones.
  # And so large that `largest` times the scale is still finite.
  top = np.nextafter(info.max / largest, np.float32(0))
  scales = jnp.clip(absmax / largest, info.tiny, top)
  usable = finite & (absmax > 0)
  data = x / jnp.where(usable, scales, 1.0)[..., None]
  data = jnp.where(finite[..., None], data, 0.0)
  if is_int:
    data = jnp.round(data)
  # A quotient may be rounded up past the largest number.
  data = jnp.clip(data, -largest, largest).astype(dtype)
  return data, jnp.where(usable, scales, jnp.where(finite, 0.0, jnp.nan))


def move(move_pages: Callable[..., Array], *arrays: Array) -> Array:
  """Returns `move_pages(*arrays)`, which gathers, scatters or copies.

  XLA for CPUs has no such operation for float8: it widens every operand to
  float16, the whole pool for a few pages. There, pages are seen as integers
  instead. A gather is then free of copies; a write still copies the array.
  """
  float8 = jnp.dtype(jnp.float8_e4m3fn)
  if arrays[0].dtype != float8:
    return move_pages(*arrays)

  def on_cpu(*arrays: Array) -> Array:
    # Kept together: in a loop, the view of the pool would become a copy of it.
    arrays = lax.optimization_barrier(arrays)
    bits = [
      lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == float8 else x
      for x in arrays
    ]
    return lax.bitcast_convert_type(move_pages(*bits), float8)

  return lax.platform_dependent(*arrays, cpu=on_cpu, default=move_pages)
