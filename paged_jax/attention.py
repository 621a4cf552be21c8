"""The two public attention ops over a paged KV pool.

Both check their arguments, choose an implementation and call it:

  * `"mosaic_gpu"`: Pallas kernels for Hopper GPUs (`pallas_kernels`).
  * `"xla"`: plain JAX that streams over KV tiles; every option, every device.

The default takes the kernel where it exists for the shapes at hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from paged_jax import attention_xla, devices, kv_pool
from pallas_kernels import paged_decode

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
_STATIC_OPTIONS = (
  "scale",
  "sliding_window",
  "num_sink_tokens",
  "logits_soft_cap",
)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def paged_attention(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  *,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
  sinks: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Attends with one query token per sequence (decode) over paged K and V.

  The query of sequence `i` stands at position `kv_lens[i] - 1`: its own key is
  in the pool already.

  Args:
    q: [num_seqs, num_q_heads, head_dim].
    k_pages: [num_pages, num_kv_heads, page_size, head_dim], dtype of `q`.
    v_pages: The same of the values.
    kv_lens: i32[num_seqs], tokens stored; 0 gives an output of 0.
    page_indices: i32[num_seqs, pages_per_seq], physical page of each logical
      page. Pages out of `[0, num_pages)` are holes: their keys are not seen.
    scale: Multiplies the logits; `head_dim ** -0.5` if None.
    sliding_window: If given, a query at `pos` sees keys in
      `(pos - sliding_window, pos]` only.
    num_sink_tokens: The first tokens of a sequence that stay visible besides
      the window.
    logits_soft_cap: If given, logits become `cap * tanh(logits / cap)`.
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
  _check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  _check_options(
    q, scale, sliding_window, num_sink_tokens, logits_soft_cap, sinks
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
    sinks,
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    implementation=_choose_decode(implementation, q, k_pages),
  )
  return (out, lse) if return_lse else out


def ragged_paged_attention(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  k_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""] | int,
  *,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
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
    scale: See `paged_attention`, as for the other options.
    sliding_window: See `paged_attention`.
    num_sink_tokens: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
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
  _check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  _check_options(
    q, scale, sliding_window, num_sink_tokens, logits_soft_cap, sinks
  )
  active = num_active
  if isinstance(active, int):
    active = np.int32(max(0, min(active, kv_lens.shape[0])))
  _check_ints(cu_q_lens=cu_q_lens, num_active=active)
  if cu_q_lens.shape != (kv_lens.shape[0] + 1,):
    raise ValueError(
      f"cu_q_lens.shape={cu_q_lens.shape} must be ({kv_lens.shape[0] + 1},): "
      "num_seqs + 1."
    )
  if active.shape not in ((), (1,)):
    raise ValueError(f"num_active.shape={active.shape} must be () or (1,).")
  _choose_ragged(implementation)
  out, lse = _ragged_paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    jnp.reshape(active, ()),
    sinks,
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
  )
  return (out, lse) if return_lse else out


# Jitted, so that the unrolled layers of a model lower one kernel, not many.
@functools.partial(
  jax.jit,
  static_argnames=(*_STATIC_OPTIONS, "implementation"),
)
def _paged_attention(*args, implementation: str, **options):
  xla = functools.partial(attention_xla.paged_attention, **options)
  if implementation == "xla":
    return xla(*args)

  def mosaic(q, k_pages, v_pages, kv_lens, page_indices, sinks):
    return paged_decode.paged_decode(
      q, k_pages, v_pages, kv_lens, page_indices, sinks=sinks, **options
    )

  # A process with a GPU may still compile for its CPU.
  return lax.platform_dependent(*args, cuda=mosaic, default=xla)


_ragged_paged_attention = jax.jit(
  attention_xla.ragged_paged_attention,
  static_argnames=_STATIC_OPTIONS,
)


def why_not_mosaic_gpu(q: Array, k_pages: Array) -> str | None:
  """Returns why the decode kernel cannot serve these arrays here, or None."""
  device = devices.why_not_hopper()
  if device is not None:
    return device
  _, num_kv_heads, page_size, head_dim = k_pages.shape
  return paged_decode.unsupported(
    head_dim=head_dim,
    page_size=page_size,
    num_q_heads=q.shape[1],
    num_kv_heads=num_kv_heads,
    dtype=q.dtype,
  )


def _choose_decode(implementation: str | None, q: Array, k_pages: Array) -> str:
  check_implementation(implementation)
  if implementation == "xla":
    return "xla"
  reason = why_not_mosaic_gpu(q, k_pages)
  if implementation is None:
    return "mosaic_gpu" if reason is None else "xla"
  if reason is not None:
    raise NotImplementedError(f"{implementation=} is not available: {reason}")
  return implementation


def _choose_ragged(implementation: str | None) -> None:
  check_implementation(implementation)
  if implementation == "mosaic_gpu":
    raise NotImplementedError(
      f"{implementation=} is not available: ragged_paged_attention has the "
      "'xla' implementation only."
    )


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError if there is no such implementation."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} must be None or one of {IMPLEMENTATIONS}."
    )


def _check_pools(q, k_pages, v_pages, kv_lens, page_indices) -> None:
  ranks = dict(q=(q, 3), k_pages=(k_pages, 4), v_pages=(v_pages, 4))
  ranks |= dict(kv_lens=(kv_lens, 1), page_indices=(page_indices, 2))
  _check_arrays(**{name: x for name, (x, _) in ranks.items()})
  for name, (x, ndim) in ranks.items():
    if jnp.ndim(x) != ndim:
      raise ValueError(f"{name}.shape={jnp.shape(x)} must have {ndim} axes.")
  for name, x in (("k_pages", k_pages), ("v_pages", v_pages), ("q", q)):
    if x.dtype not in kv_pool.DTYPES:
      raise ValueError(
        f"{name}.dtype={x.dtype} must be float32, bfloat16 or float16."
      )
    if x.dtype != k_pages.dtype:
      raise ValueError(
        f"{name}.dtype={x.dtype} must be that of {k_pages.dtype=}."
      )
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
    raise ValueError(f"{q.shape=} must have head_dim {head_dim} of k_pages.")
  if q.shape[1] % num_kv_heads:
    raise ValueError(
      f"num_q_heads={q.shape[1]} must be a multiple of {num_kv_heads=}."
    )
  _check_ints(kv_lens=kv_lens, page_indices=page_indices)
  if page_indices.shape[0] != kv_lens.shape[0]:
    raise ValueError(
      f"{page_indices.shape=} must have one row for each of {kv_lens.shape=}."
    )


def _check_arrays(**arrays) -> None:
  for name, x in arrays.items():
    if not hasattr(x, "dtype"):
      raise ValueError(f"{name} must be an array, got {type(x).__name__}.")


def _check_ints(**arrays) -> None:
  _check_arrays(**arrays)
  for name, x in arrays.items():
    if x.dtype != jnp.int32:
      raise ValueError(f"{name}.dtype={x.dtype} must be int32.")


def _check_options(
  q, scale, sliding_window, num_sink_tokens, logits_soft_cap, sinks
) -> None:
  numbers = dict(scale=scale, logits_soft_cap=logits_soft_cap)
  for name, value in numbers.items():
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{name}={value!r} must be a Python number.")
  if logits_soft_cap is not None and not 0 < logits_soft_cap < float("inf"):
    raise ValueError(f"{logits_soft_cap=} must be positive and finite.")
  if scale is not None and not abs(scale) <= _FLOAT32_MAX:
    raise ValueError(f"{scale=} must be finite in float32.")
  if sliding_window is not None:
    _check_count("sliding_window", sliding_window, 1)
  _check_count("num_sink_tokens", num_sink_tokens, 0)
  if sinks is None:
    return
  _check_arrays(sinks=sinks)
  if jnp.shape(sinks) != (q.shape[1],):
    raise ValueError(
      f"sinks.shape={jnp.shape(sinks)} must be ({q.shape[1]},): num_q_heads."
    )
  if sinks.dtype not in kv_pool.DTYPES:
    raise ValueError(
      f"sinks.dtype={sinks.dtype} must be float32, bfloat16 or float16."
    )


def _check_count(name: str, value: object, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f"{name}={value!r} must be a Python integer.")
  if not least <= value < 2**31:
    raise ValueError(f"{name}={value} must be in [{least}, 2**31).")
