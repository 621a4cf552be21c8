"""Checks of the arguments of the public attention ops."""

import jax.numpy as jnp
from jax import Array

from paged_jax.kv import dtypes
from pallas_kernels.common.checks import check_scales
from pallas_kernels.common.paged_kv import PagedKV


def check_paged(q: Array, kv: PagedKV) -> None:
  """Raises a ValueError if queries, pages or tables do not fit together.

  Args:
    q: [num_tokens, num_q_heads, head_dim].
    kv: The arguments of a public op; its pages have no layer axis.
  """
  k_pages, v_pages = kv.k, kv.v
  kv_lens, page_indices = kv.kv_lens, kv.page_indices
  ranks = dict(q=(q, 3), k_pages=(k_pages, 4), v_pages=(v_pages, 4))
  ranks |= dict(kv_lens=(kv_lens, 1), page_indices=(page_indices, 2))
  check_are_arrays(**{name: x for name, (x, _) in ranks.items()})
  for name, (x, ndim) in ranks.items():
    if jnp.ndim(x) != ndim:
      raise ValueError(f"{name}.shape={jnp.shape(x)} must have {ndim} axes.")
  _check_dtypes(q, k_pages, v_pages)
  for name, x in (("k_pages", k_pages), ("v_pages", v_pages), ("q", q)):
    if 0 in x.shape[1:]:
      raise ValueError(f"{name}.shape={x.shape} has an empty axis.")
  if k_pages.shape != v_pages.shape:
    raise ValueError(f"{k_pages.shape=} must equal {v_pages.shape=}.")
  num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
  if num_pages < 1:
    raise ValueError(f"{k_pages.shape=} has no pages.")
  if page_indices.shape[1] < 1:
    raise ValueError(f"{page_indices.shape=} has no columns.")
  if page_size % 8:
    raise ValueError(f"{page_size=} must be a multiple of 8.")
  if q.shape[2] != head_dim:
    raise ValueError(f"{q.shape=} must have {head_dim=}, as k_pages has.")
  if q.shape[1] % num_kv_heads:
    raise ValueError(
      f"num_q_heads={q.shape[1]} must be a multiple of {num_kv_heads=}."
    )
  scales = dict(k_scales=kv.k_scales, v_scales=kv.v_scales)
  check_are_arrays(**{n: x for n, x in scales.items() if x is not None})
  check_scales(k_pages, **scales)
  check_ints(kv_lens=kv_lens, page_indices=page_indices)
  if page_indices.shape[0] != kv_lens.shape[0]:
    raise ValueError(
      f"{page_indices.shape=} must have one row for each of {kv_lens.shape=}."
    )


def check_one_query_each(q, kv_lens) -> None:
  """Raises a ValueError if there is not one query for each sequence."""
  if q.shape[0] != kv_lens.shape[0]:
    raise ValueError(
      f"q.shape={q.shape} must have one query for each of "
      f"kv_lens.shape={kv_lens.shape}."
    )


def _check_dtypes(q, k_pages, v_pages) -> None:
  for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
    if x.dtype not in dtypes.DTYPES:
      raise ValueError(f"{name}.dtype={x.dtype} must be {dtypes.NAMES}.")
  if q.dtype not in dtypes.FLOAT_DTYPES:
    raise ValueError(f"q.dtype={q.dtype} must be {dtypes.FLOAT_NAMES}.")
  alike = dict(v_pages=v_pages)
  if not dtypes.is_quantised(k_pages.dtype):
    alike |= dict(q=q)
  for name, x in alike.items():
    if x.dtype != k_pages.dtype:
      raise ValueError(f"{name}.dtype={x.dtype} must equal {k_pages.dtype=}.")


def check_are_arrays(**arrays) -> None:
  """Raises a ValueError if an argument is not an array."""
  for name, x in arrays.items():
    if not hasattr(x, "dtype"):
      raise ValueError(f"{name} must be an array, got {type(x).__name__}.")


def check_ints(**arrays) -> None:
  """Raises a ValueError if an argument is not an i32 array."""
  check_are_arrays(**arrays)
  for name, x in arrays.items():
    if x.dtype != jnp.int32:
      raise ValueError(f"{name}.dtype={x.dtype} must be int32.")


def check_per_head(q, **arrays) -> None:
  """Raises a ValueError if an argument is not a float array [num_q_heads]."""
  check_are_arrays(**arrays)
  for name, x in arrays.items():
    if jnp.shape(x) != (q.shape[1],):
      raise ValueError(
        f"{name}.shape={jnp.shape(x)} must be ({q.shape[1]},): num_q_heads."
      )
    if x.dtype not in dtypes.FLOAT_DTYPES:
      raise ValueError(f"{name}.dtype={x.dtype} must be {dtypes.FLOAT_NAMES}.")
