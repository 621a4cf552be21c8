"""The two public attention ops over a paged KV pool.

Both check their arguments, choose an implementation and call it:

  * `"mosaic_gpu"`: Pallas kernels for Hopper GPUs (`pallas_kernels`).
  * `"xla"`: plain JAX that streams over KV tiles; every option, every device.

The default takes the kernel where it exists for the shapes at hand.
"""

import functools
from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Real

from paged_jax import attention_checks, attention_xla, devices
from pallas_kernels import (
  decode_config,
  paged_decode,
  ragged_attention,
  ragged_config,
  short_queries,
)

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


def paged_attention(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  *,
  k_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Attends with one query token per sequence (decode) over paged K and V.

  The query of sequence `i` stands at position `kv_lens[i] - 1`: its own key is
  in the pool already.

  Args:
    q: [num_seqs, num_q_heads, head_dim], bfloat16, float16 or float32.
    k_pages: [num_pages, num_kv_heads, page_size, head_dim], dtype of `q`, or
      int8 or float8_e4m3fn with scales.
    v_pages: The same of the values.
    kv_lens: i32[num_seqs], tokens stored; 0 or less gives an output of 0. Of
      more than the table has room for, only what the table names is seen.
    page_indices: i32[num_seqs, pages_per_seq], physical page of each logical
      page. Pages out of `[0, num_pages)` are holes: their keys are not seen.
    k_scales: f32[num_pages, num_kv_heads, page_size], factors, at least
      0, of the keys of int8 or float8_e4m3fn pages; None for other pages. The
      kernel of decode takes factors of values below 2**-100 for that; that of
      prefill rounds keys and values, times their factors, to the dtype of `q`.
    v_scales: The same of the values.
    scale: Multiplies the logits; `head_dim ** -0.5` if None.
    sliding_window: If given, a query at `pos` sees keys in
      `(pos - sliding_window, pos]` only.
    num_sink_tokens: The first tokens of a sequence that stay visible besides
      the window.
    logits_soft_cap: If given, logits become `cap * tanh(logits / cap)`.
    batch_invariant: Whether what a sequence gets must be the same, bit for bit,
      whatever the other sequences are and however many. It costs the kernel
      about a tenth of its speed, and memory for up to 16 partial results of
      each sequence and KV head. Plain JAX folds the keys of each row in their
      order anyway, and is as invariant as XLA's products are.
    sinks: [num_q_heads], one more logit per head in the denominator.
    return_lse: Whether to return the log-sum-exp too.
    implementation: `"mosaic_gpu"`, `"xla"`, or None to choose.

  Returns:
    [num_seqs, num_q_heads, head_dim] in the dtype of `q`; with `return_lse`
    also f32[num_seqs, num_q_heads], the natural log of the sum of the
    exponentiated logits, sinks included. Sequences with nothing to attend to
    give 0 and -inf.

  Raises:
    ValueError: If a shape, dtype or option is wrong.
    NotImplementedError: If `implementation` cannot serve these arguments here.
  """
  attention_checks.check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  attention_checks.check_scales(k_pages, k_scales, v_scales)
  attention_checks.check_options(
    q,
    scale,
    sliding_window,
    num_sink_tokens,
    logits_soft_cap,
    batch_invariant,
    sinks,
  )
  if q.shape[0] != kv_lens.shape[0]:
    raise ValueError(
      f"q.shape={q.shape} must have one query for each of "
      f"kv_lens.shape={kv_lens.shape}."
    )
  out, lse = _paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    k_scales,
    v_scales,
    sinks,
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    implementation=_choose(
      implementation, lambda: why_not_mosaic_gpu(q, k_pages)
    ),
  )
  return (out, lse) if return_lse else out


def ragged_paged_attention(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""] | int,
  *,
  max_q_len: int | None = None,
  k_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Attends causally with any number of query tokens per sequence.

  Queries of all sequences lie one after the other on the token axis: those of
  sequence `s` are `cu_q_lens[s] : cu_q_lens[s + 1]`. They are its last tokens:
  query `i` of `q_len` sees its first `kv_len - q_len + i + 1` keys. Prefill,
  chunks on top of a context, decode, and a mixture are the same call.

  Args:
    q: [num_tokens, num_q_heads, head_dim].
    k_pages: See `paged_attention`.
    v_pages: See `paged_attention`.
    kv_lens: i32[num_seqs], tokens stored, the queries' own included.
    page_indices: See `paged_attention`.
    cu_q_lens: i32[num_seqs + 1], offsets into the token axis, not decreasing,
      `cu_q_lens[0] == 0`.
    num_active: i32[] or i32[1]; sequences from this row on are ignored.
    max_q_len: Most query tokens of a sequence, if it is known; up to 8, the
      kernel of decode takes them, as for the verification of speculative
      tokens. It is not checked: what a sequence has beyond it may be left at 0
      and -inf.
    k_scales: See `paged_attention`, as for the other options.
    v_scales: See `paged_attention`.
    scale: See `paged_attention`.
    sliding_window: See `paged_attention`.
    num_sink_tokens: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`.
    sinks: See `paged_attention`.
    return_lse: See `paged_attention`.
    implementation: See `paged_attention`.

  Returns:
    [num_tokens, num_q_heads, head_dim]; with `return_lse` also
    f32[num_tokens, num_q_heads]. Tokens past `cu_q_lens[num_active]`, and those
    with nothing to attend to, give 0 and -inf.

  Raises:
    ValueError: If a shape, dtype or option is wrong.
    NotImplementedError: If `implementation` cannot serve these arguments here.
  """
  attention_checks.check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  attention_checks.check_scales(k_pages, k_scales, v_scales)
  attention_checks.check_options(
    q,
    scale,
    sliding_window,
    num_sink_tokens,
    logits_soft_cap,
    batch_invariant,
    sinks,
  )
  active = num_active
  if isinstance(active, int):
    active = np.int32(max(0, min(active, kv_lens.shape[0])))
  attention_checks.check_ints(cu_q_lens=cu_q_lens, num_active=active)
  if cu_q_lens.shape != (kv_lens.shape[0] + 1,):
    raise ValueError(
      f"cu_q_lens.shape={cu_q_lens.shape} must be ({kv_lens.shape[0] + 1},): "
      "num_seqs + 1."
    )
  if active.shape not in ((), (1,)):
    raise ValueError(f"num_active.shape={active.shape} must be () or (1,).")
  if max_q_len is not None:
    attention_checks.check_count("max_q_len", max_q_len, 1)
  out, lse = _ragged_paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    jnp.reshape(active, ()),
    k_scales,
    v_scales,
    sinks,
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    max_q_len=max_q_len,
    implementation=_choose(
      implementation, lambda: why_not_mosaic_gpu(q, k_pages, max_q_len)
    ),
  )
  return (out, lse) if return_lse else out


# Jitted, so that the unrolled layers of a model lower one kernel, not many.
@functools.partial(
  jax.jit,
  static_argnames=(*paged_decode.OPTIONS, "implementation"),
)
def _paged_attention(*args, implementation: str, **options):
  xla = _xla(attention_xla.paged_attention, **options)
  if implementation == "xla":
    return xla(*args)

  def mosaic(*args):
    *args, k_scales, v_scales, sinks = args
    return paged_decode.paged_decode(
      *args, k_scales=k_scales, v_scales=v_scales, sinks=sinks, **options
    )

  # A process with a GPU may still compile for its CPU.
  return lax.platform_dependent(*args, cuda=mosaic, default=xla)


@functools.partial(
  jax.jit,
  static_argnames=(*paged_decode.OPTIONS, "max_q_len", "implementation"),
)
def _ragged_paged_attention(
  *args, max_q_len: int | None, implementation: str, **options
):
  xla = _xla(attention_xla.ragged_paged_attention, **options)
  if implementation == "xla":
    return xla(*args)

  def mosaic(*args):
    *args, k_scales, v_scales, sinks = args
    more = dict(k_scales=k_scales, v_scales=v_scales, sinks=sinks)
    if _has_few_queries(max_q_len):
      more["max_q_len"] = max_q_len
      return short_queries.attend(*args, **more, **options)
    return ragged_attention.attend(*args, **more, **options)

  return lax.platform_dependent(*args, cuda=mosaic, default=xla)


def _xla(attend: Callable, *, batch_invariant: bool, **options) -> Callable:
  del batch_invariant  # it folds the tiles of each row in their order
  return functools.partial(attend, **options)


def why_not_mosaic_gpu(
  q: Array | jax.ShapeDtypeStruct,
  k_pages: Array | jax.ShapeDtypeStruct,
  max_q_len: int | None = 1,
) -> str | None:
  """Returns why no kernel can serve these arrays here, or None.

  Args:
    q: As in the ops, or its shape and dtype.
    k_pages: The same.
    max_q_len: Most query tokens of a sequence, None if it is not known.
  """
  if device := devices.why_not_hopper():
    return device
  _, num_kv_heads, page_size, head_dim = k_pages.shape
  shape = head_dim, page_size, q.shape[1], num_kv_heads, q.dtype
  if _has_few_queries(max_q_len):
    return decode_config.unsupported(
      *shape, kv_dtype=k_pages.dtype, max_q_len=max_q_len
    )
  return ragged_config.unsupported(*shape, kv_dtype=k_pages.dtype)


def _has_few_queries(max_q_len: int | None) -> TypeGuard[int]:
  """Returns whether the decode kernel takes the queries of a sequence."""
  return max_q_len is not None and max_q_len <= decode_config.MAX_Q_LEN


def _choose(implementation: str | None, why_not: Callable) -> str:
  """Returns the implementation to take, given why the kernel is none."""
  check_implementation(implementation)
  if implementation == "xla":
    return "xla"
  reason = why_not()
  if implementation is None:
    return "mosaic_gpu" if reason is None else "xla"
  if reason is not None:
    raise NotImplementedError(f"{implementation=} is not available: {reason}")
  return implementation


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError if there is no such implementation."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} must be None or one of {IMPLEMENTATIONS}."
    )
