"""The dtypes that a pool can store keys and values in."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.common import limits

FLOAT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
QUANTISED_DTYPES = tuple(map(jnp.dtype, limits.QUANTISED_DTYPES))
DTYPES = FLOAT_DTYPES + QUANTISED_DTYPES
FLOAT_NAMES = "float32, bfloat16 or float16"
NAMES = "bfloat16, float16, float32, int8 or float8_e4m3fn"
SCALE_DTYPE = jnp.dtype(jnp.float32)

is_quantised = limits.is_quantised


def check(dtype: DTypeLike) -> None:
  """Raises a ValueError if a pool cannot store a dtype."""
  try:
    is_known = jnp.dtype(dtype) in DTYPES
  except TypeError:
    is_known = False
  if not is_known:
    raise ValueError(f"{dtype=} must be {NAMES}.")


def query_dtype(dtype: DTypeLike, kv_dtype: DTypeLike) -> np.dtype:
  """Returns the dtype to which queries are cast before they attend.

  It is that of the pages, or `dtype` if the pages are quantised.

  Args:
    dtype: Dtype of the model's queries.
    kv_dtype: Dtype of the pages.
  """
  return jnp.dtype(dtype if is_quantised(kv_dtype) else kv_dtype)
