"""Attention over a paged KV pool: `paged_attention`, `ragged_paged_attention`.

Both ops check their arguments and call one of two implementations:

  * `"mosaic_gpu"`: Pallas kernels for Hopper GPUs (`pallas_kernels`).
  * `"xla"`: plain JAX that streams over KV tiles; every option, every device.

By default, they call the kernel if it supports the shapes on this device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Real

from paged_jax import dispatch
from paged_jax.dispatch import AttentionShapes
from paged_jax.ops import checks, xla
from paged_jax.ops.gradients import without_gradient
from paged_jax.ops.options import check_arrays, make_spec
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import (
  AttentionArrays,
  AttentionSpec,
  check_count,
)


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
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Computes attention of one query token per sequence (decode) over pages.

  This is PagedAttention (Kwon et al., 2023, section 4.1) with grouped-query
  heads: query head `h` reads KV head `h // (num_q_heads // num_kv_heads)`. The
  query of sequence `i` is at position `pos = kv_lens[i] - 1`, and its own key
  must already be in the pool. For each query head, over the visible keys `j`:

      s[j] = scale * dot(q, k[j])
      s[j] = cap * tanh(s[j] / cap)    with logits_soft_cap
      s[j] = s[j] + slope * (j - pos)  with alibi_slopes
      lse  = log(sum_j exp(s[j]) + exp(sink))    exp(sink) only with sinks
      out  = sum_j exp(s[j] - lse) * v[j]

  Args:
    q: [num_seqs, num_q_heads, head_dim], bfloat16, float16 or float32.
    k_pages: [num_pages, num_kv_heads, page_size, head_dim], in the dtype of
      `q`, or int8 or float8_e4m3fn with scales. `page_size` is a multiple of 8.
    v_pages: Value pages, like `k_pages`.
    kv_lens: i32[num_seqs], tokens stored; 0 or less gives an output of 0.
      Positions past the end of the table are not visible.
    page_indices: i32[num_seqs, pages_per_seq], physical page of each logical
      page. Keys in pages out of `[0, num_pages)` are not visible.
    k_scales: f32[num_pages, num_kv_heads, page_size], at least 0: a key of an
      int8 or float8_e4m3fn page is its data times its scale. None for other
      dtypes. The decode kernel clamps value scales to at least 2**-100. The
      ragged kernel dequantises K and V to the dtype of `q` before multiplying.
    v_scales: Scales of the values, like `k_scales`.
    scale: Multiplies the logits; `head_dim ** -0.5` if None.
    sliding_window: At least 1. If given, only the keys at positions in
      `(pos - sliding_window, pos]` are visible.
    num_sink_tokens: At least 0. Number of first tokens of a sequence that stay
      visible outside the window (Xiao et al., 2023).
    logits_soft_cap: Above 0. If given, limits the logits to `[-cap, cap]`.
    batch_invariant: If True, the output of a sequence does not depend on the
      rest of the batch, bit for bit. The kernel becomes about 10 % slower, and
      stores up to 16 partial results for each sequence and KV head. The XLA
      implementation ignores it, and is as invariant as XLA's matrix products.
    sinks: [num_q_heads], one more logit per head, only in the denominator.
    alibi_slopes: [num_q_heads], slopes of ALiBi (Press et al., 2022, section
      3), clamped to a magnitude of 2**95.
    return_lse: Whether to return the log-sum-exp too.
    implementation: `"mosaic_gpu"`, `"xla"`, or None to choose.

  Returns:
    The output [num_seqs, num_q_heads, head_dim] in the dtype of `q`; with
    `return_lse`, the pair of the output and `lse`, f32[num_seqs, num_q_heads].
    Sequences without a visible key give 0 and -inf, with or without sinks.

  Raises:
    ValueError: If an argument is not an array, or has the wrong rank, shape or
      dtype; if `num_q_heads` is not a multiple of `num_kv_heads`, or
      `page_size` of 8; if scales are missing for quantised pages or given for
      others; or if an option is out of its range.
    NotImplementedError: If `implementation` cannot serve these arguments here;
      the message says why. If it is differentiated: a model trains without a
      cache.
  """
  kv = PagedKV(
    k_pages, v_pages, k_scales, v_scales, None, kv_lens, page_indices
  )
  checks.check_paged(q, kv)
  spec = make_spec(
    q.shape[-1],
    scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
  )
  arrays = AttentionArrays(sinks=sinks, alibi_slopes=alibi_slopes)
  check_arrays(arrays, q, spec)
  checks.check_one_query_each(q, kv_lens)
  out, lse = attend_decode(q, kv, arrays, spec, implementation)
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
  causal: bool = True,
  tree_mask: Bool[Array, "num_tokens max_new"] | None = None,
  k_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None = None,
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Computes attention of any number of query tokens per sequence.

  The queries of all sequences lie one after the other on the token axis:
  sequence `s` has the tokens `cu_q_lens[s] : cu_q_lens[s + 1]`. They are its
  last tokens: query `i` of `q_len` is at position `pos = kv_len - q_len + i`
  and sees the keys up to `pos`, unless `causal` or `tree_mask` says otherwise.
  One call can mix prefill, chunks on top of a context, decode, and the
  verification of speculative tokens. See `paged_attention` for the formula.

  Args:
    q: [num_tokens, num_q_heads, head_dim], bfloat16, float16 or float32.
    k_pages: See `paged_attention`.
    v_pages: See `paged_attention`.
    kv_lens: i32[num_seqs], tokens stored, including those of the queries.
    page_indices: See `paged_attention`.
    cu_q_lens: i32[num_seqs + 1], offsets into the token axis, not decreasing,
      `cu_q_lens[0] == 0`.
    num_active: i32[], i32[1] or an integer; sequences from this row on are
      ignored.
    max_q_len: Upper bound of the query tokens of a sequence, at least 1, if
      known. If it is at most 8, the decode kernel serves the call. The op does
      not check the bound: query tokens beyond it may give 0 and -inf, and with
      `causal=False` they shift the positions used for `alibi_slopes`.
    causal: Whether a query sees only keys up to its own position. If False, it
      sees all keys of its sequence.
    tree_mask: bool[num_tokens, max_new], for a tree of speculative tokens:
      `tree_mask[t, j]` is True if token `t` may attend to the j-th query token
      of its sequence, whose key is at `kv_len - q_len + j`. All query tokens
      attend to the keys before `kv_len - q_len`. The mask replaces causality: a
      token does not even attend to itself unless the mask says so. Columns from
      `q_len` on are ignored. Query tokens past the last column are not visible,
      and those beyond `max_q_len` may not be.
    k_scales: See `paged_attention`.
    v_scales: See `paged_attention`.
    scale: See `paged_attention`.
    sliding_window: See `paged_attention`; requires `causal=True`. With a
      `tree_mask`, `pos` is `kv_len - q_len` plus the token's depth in the tree,
      which is the number of query tokens that it attends to, minus 1, and the
      window limits only the keys before `kv_len - q_len`.
    num_sink_tokens: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`.
    sinks: See `paged_attention`.
    alibi_slopes: See `paged_attention`; `tree_mask` must be None. The position
      of query `i` is `kv_len - q_len + i`, also with `causal=False`.
    return_lse: See `paged_attention`.
    implementation: See `paged_attention`.

  Returns:
    The output [num_tokens, num_q_heads, head_dim] in the dtype of `q`; with
    `return_lse`, the pair of the output and `lse`, f32[num_tokens,
    num_q_heads]. Tokens past `cu_q_lens[num_active]`, and tokens without a
    visible key, give 0 and -inf.

  Raises:
    ValueError: See `paged_attention`; also if `cu_q_lens` or `num_active` has
      the wrong shape or dtype, if `causal=False` is combined with
      `sliding_window` or `tree_mask`, or `tree_mask` with `alibi_slopes`.
    NotImplementedError: If `implementation` cannot serve these arguments here;
      the message says why. If it is differentiated: a model trains without a
      cache.
  """
  kv = PagedKV(
    k_pages, v_pages, k_scales, v_scales, None, kv_lens, page_indices
  )
  checks.check_paged(q, kv)
  spec = make_spec(
    q.shape[-1],
    scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    causal=causal,
  )
  arrays = AttentionArrays(sinks, alibi_slopes, tree_mask)
  check_arrays(arrays, q, spec)
  active = num_active
  if isinstance(active, bool):
    raise ValueError(f"num_active={active} must be an integer.")
  if isinstance(active, int):
    active = np.int32(max(0, min(active, kv_lens.shape[0])))
  checks.check_ints(cu_q_lens=cu_q_lens, num_active=active)
  if cu_q_lens.shape != (kv_lens.shape[0] + 1,):
    raise ValueError(
      f"cu_q_lens.shape={cu_q_lens.shape} must be ({kv_lens.shape[0] + 1},): "
      "num_seqs + 1."
    )
  if active.shape not in ((), (1,)):
    raise ValueError(f"num_active.shape={active.shape} must be () or (1,).")
  if max_q_len is not None:
    check_count("max_q_len", max_q_len, 1)
  out, lse = attend_ragged(
    q,
    kv,
    cu_q_lens,
    jnp.asarray(active).reshape(()),
    arrays,
    spec,
    implementation,
    max_q_len=max_q_len,
  )
  return (out, lse) if return_lse else out


def attend_decode(
  q: Array,
  kv: PagedKV,
  arrays: AttentionArrays,
  spec: AttentionSpec,
  implementation: str | None,
) -> tuple[Array, Array]:
  """Returns the output and LSE of checked arguments; see `paged_attention`."""
  choice = dispatch.decode_attention(
    implementation, AttentionShapes.of(q, kv.k)
  )
  q, kv, arrays = without_gradient((q, kv, arrays), "paged_attention")
  return _attend_decode(
    q, kv, arrays, spec=spec, implementation=choice.implementation
  )


def attend_ragged(
  q: Array,
  kv: PagedKV,
  cu_q_lens: Array,
  num_active: Array,
  arrays: AttentionArrays,
  spec: AttentionSpec,
  implementation: str | None,
  *,
  max_q_len: int | None,
) -> tuple[Array, Array]:
  """Returns the output and LSE of checked arguments; see the public op."""
  choice = dispatch.ragged_attention(
    implementation,
    AttentionShapes.of(q, kv.k),
    max_q_len=max_q_len,
    causal=spec.causal,
    has_alibi=arrays.alibi_slopes is not None,
  )
  q, kv, arrays = without_gradient((q, kv, arrays), "ragged_paged_attention")
  return _attend_ragged(
    q,
    kv,
    cu_q_lens,
    num_active,
    arrays,
    spec=spec,
    max_q_len=max_q_len if choice.uses_decode_kernel else None,
    implementation=choice.implementation,
  )


# Jitted, so that the unrolled layers of a model lower the kernel only once.
@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _attend_decode(q, kv, arrays, *, spec, implementation):
  kv = kv.with_layer_axis()
  by_xla = functools.partial(xla.paged_attention, spec=spec)
  if implementation == "xla":
    return by_xla(q, kv, arrays)
  from pallas_kernels.decode.kernel import paged_decode

  by_kernel = functools.partial(paged_decode, spec=spec)
  # A process with a GPU may still compile for the CPU.
  return lax.platform_dependent(q, kv, arrays, cuda=by_kernel, default=by_xla)


@functools.partial(
  jax.jit, static_argnames=("spec", "max_q_len", "implementation")
)
def _attend_ragged(
  q, kv, cu_q_lens, num_active, arrays, *, spec, max_q_len, implementation
):
  args = q, kv.with_layer_axis(), cu_q_lens, num_active, arrays
  by_xla = functools.partial(xla.ragged_paged_attention, spec=spec)
  if implementation == "xla":
    return by_xla(*args)
  if max_q_len is not None:
    from pallas_kernels.decode.short_queries import attend

    by_kernel = functools.partial(attend, spec=spec, max_q_len=max_q_len)
  else:
    from pallas_kernels.ragged.kernel import attend

    by_kernel = functools.partial(attend, spec=spec)
  return lax.platform_dependent(*args, cuda=by_kernel, default=by_xla)
