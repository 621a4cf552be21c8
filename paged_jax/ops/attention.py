"""The two public attention ops over a paged KV pool.

Both check their arguments, choose an implementation and call it:

  * `"mosaic_gpu"`: Pallas kernels for Hopper GPUs (`pallas_kernels`).
  * `"xla"`: plain JAX that streams over KV tiles; every option, every device.

By default, the kernel is used wherever it takes the shapes at hand.
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
  """Attends with one query token per sequence (decode) over paged K and V.

  The query of sequence `i` stands at position `kv_lens[i] - 1`; its own key is
  already in the pool.

  Args:
    q: [num_seqs, num_q_heads, head_dim], bfloat16, float16 or float32.
    k_pages: [num_pages, num_kv_heads, page_size, head_dim], dtype of `q`, or
      int8 or float8_e4m3fn with scales.
    v_pages: The same of the values.
    kv_lens: i32[num_seqs], tokens stored; 0 or less gives an output of 0.
      Positions past the end of the table are not seen.
    page_indices: i32[num_seqs, pages_per_seq], physical page of each logical
      page. Pages out of `[0, num_pages)` are holes: their keys are not seen.
    k_scales: f32[num_pages, num_kv_heads, page_size], factors, at least
      0, of the keys of int8 or float8_e4m3fn pages; None for other pages. The
      decode kernel clamps value scales to at least 2**-100. The ragged kernel
      dequantises K and V to the dtype of `q` before multiplying.
    v_scales: The same of the values.
    scale: Multiplies the logits; `head_dim ** -0.5` if None.
    sliding_window: If given, a query at `pos` sees keys in
      `(pos - sliding_window, pos]` only.
    num_sink_tokens: The first tokens of a sequence that stay visible besides
      the window.
    logits_soft_cap: If given, logits become `cap * tanh(logits / cap)`.
    batch_invariant: If True, the output of a sequence does not depend on the
      rest of the batch, bit for bit. It costs the kernel about 10 %, and memory
      for up to 16 partial results of each sequence and KV head. The XLA
      implementation is as invariant as XLA's matrix products are, either way.
    sinks: [num_q_heads], one more logit per head in the denominator.
    alibi_slopes: [num_q_heads]; ALiBi (Press et al., 2022, section 3): after
      the soft cap, the head's slope times the position of the key minus that
      of the query (0 or less) is added to the logit. Slopes are clamped to
      2**95.
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
  """Attends with any number of query tokens per sequence.

  Queries of all sequences lie one after the other on the token axis: those of
  sequence `s` are `cu_q_lens[s] : cu_q_lens[s + 1]`. They are its last tokens:
  query `i` of `q_len` sees its first `kv_len - q_len + i + 1` keys, unless
  `causal` or `tree_mask` says otherwise. Prefill, chunks on top of a context,
  decode, verification, and a mixture are the same call.

  Args:
    q: [num_tokens, num_q_heads, head_dim].
    k_pages: See `paged_attention`.
    v_pages: See `paged_attention`.
    kv_lens: i32[num_seqs], tokens stored, the queries' own included.
    page_indices: See `paged_attention`.
    cu_q_lens: i32[num_seqs + 1], offsets into the token axis, not decreasing,
      `cu_q_lens[0] == 0`.
    num_active: i32[] or i32[1]; sequences from this row on are ignored.
    max_q_len: Most query tokens of a sequence, if it is known. Up to 8 are
      served by the decode kernel, as in the verification of speculative tokens.
      It is not checked: tokens of a sequence beyond it may get 0 and -inf, and
      do not count for `alibi_slopes` without `causal`.
    causal: Whether a query sees no key past its own; if not, it sees all keys
      of its sequence.
    tree_mask: bool[num_tokens, max_new], to verify a tree of speculative
      tokens: `tree_mask[t, j]` is True if token `t` may attend to the j-th
      query token of its sequence, whose key is at `kv_len - q_len + j`. All
      query tokens attend to the keys before these. The mask alone decides: no
      order, no causality and no self-attention is assumed. Columns from `q_len`
      on are ignored; query tokens past the last column are not seen, and those
      beyond `max_q_len` may not be seen either.
    k_scales: See `paged_attention`, as for the other options.
    v_scales: See `paged_attention`.
    scale: See `paged_attention`.
    sliding_window: See `paged_attention`; `causal` must be True. With a
      `tree_mask`, a token stands where its path does: `pos` is
      `kv_len - q_len` plus the number of query tokens that it sees, minus 1,
      and the window bounds the keys before `kv_len - q_len` only.
    num_sink_tokens: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`.
    sinks: See `paged_attention`.
    alibi_slopes: See `paged_attention`; `tree_mask` must be None. Query `i`
      stands at `kv_len - q_len + i` whatever `causal` says.
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
  """Returns output and LSE of checked arguments; see `paged_attention`."""
  choice = dispatch.decode_attention(
    implementation, AttentionShapes.of(q, kv.k)
  )
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
  """Returns output and LSE; see `ragged_paged_attention`."""
  choice = dispatch.ragged_attention(
    implementation,
    AttentionShapes.of(q, kv.k),
    max_q_len=max_q_len,
    causal=spec.causal,
    has_alibi=arrays.alibi_slopes is not None,
  )
  return _attend_ragged(
    q,
    kv,
    cu_q_lens,
    num_active,
    arrays,
    spec=spec,
    max_q_len=max_q_len if choice.by_decode else None,
    implementation=choice.implementation,
  )


# Jitted, so that the unrolled layers of a model lower one kernel, not many.
@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _attend_decode(q, kv, arrays, *, spec, implementation):
  kv = kv.with_layer_axis()
  by_xla = functools.partial(xla.paged_attention, spec=spec)
  if implementation == "xla":
    return by_xla(q, kv, arrays)
  from pallas_kernels.decode.kernel import paged_decode

  by_kernel = functools.partial(paged_decode, spec=spec)
  # A process with a GPU may still compile for its CPU.
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
