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
from jaxtyping import Array, Bool, Float, Float32, Int, Real

from paged_jax import devices
from paged_jax.ops import checks as attention_checks
from paged_jax.ops import xla as attention_xla
from paged_jax.ops.options import ArrayOptions, Options, check_tree_mask
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.decode import short_queries
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged import kernel as ragged_kernel


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
    alibi_slopes: [num_q_heads]; ALiBi (Press et al., 2022, section 3): after
      the soft cap, the logit of a key gets the head's slope times its position
      minus that of the query, 0 or less. Slopes are cut at 2**95.
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
  options = Options(
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
  )
  arrays = ArrayOptions(k_scales, v_scales, sinks, alibi_slopes)
  arrays.check(q, k_pages)
  attention_checks.check_one_query_each(q, kv_lens)
  out, lse = _paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    arrays,
    options=options,
    implementation=devices.choose(
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
    max_q_len: Most query tokens of a sequence, if it is known; up to 8, the
      kernel of decode takes them, as for the verification of speculative
      tokens. It is not checked: what a sequence has beyond it may be left at 0
      and -inf, and counts as not there for `alibi_slopes` without `causal`.
    causal: Whether a query sees no key past its own; if not, it sees all keys
      of its sequence.
    tree_mask: bool[num_tokens, max_new], to verify a tree of speculative
      tokens: `tree_mask[t, j]` says whether token `t` sees the j-th query token
      of its sequence, whose key is at `kv_len - q_len + j`. It sees all keys
      before these. The mask alone decides: no order, no causality and no token
      that sees itself is assumed. Columns from `q_len` on are ignored; query
      tokens past the last column are not seen. What a sequence has beyond
      `max_q_len` may not be seen either.
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
  attention_checks.check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  options = Options(
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    causal=causal,
  )
  arrays = ArrayOptions(k_scales, v_scales, sinks, alibi_slopes)
  arrays.check(q, k_pages)
  check_tree_mask(tree_mask, q, arrays, options)
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
  are_few = _why_not_few(q, k_pages, max_q_len) is None

  def why_not():
    if not are_few and alibi_slopes is not None and not causal:
      return "the kernel for prefill takes alibi_slopes with causal=True only."
    return why_not_mosaic_gpu(q, k_pages, max_q_len)

  out, lse = _ragged_paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    jnp.reshape(active, ()),
    tree_mask,
    arrays,
    options=options,
    max_q_len=max_q_len if are_few else None,
    implementation=devices.choose(implementation, why_not),
  )
  return (out, lse) if return_lse else out


# Jitted, so that the unrolled layers of a model lower one kernel, not many.
@functools.partial(jax.jit, static_argnames=("options", "implementation"))
def _paged_attention(*args, options: Options, implementation: str):
  xla = functools.partial(attention_xla.paged_attention, options=options)
  if implementation == "xla":
    return xla(*args)

  def mosaic(*args):
    *args, arrays = args
    return decode_kernel.paged_decode(
      *args, **arrays._asdict(), **options.named(decode_kernel.OPTIONS)
    )

  # A process with a GPU may still compile for its CPU.
  return lax.platform_dependent(*args, cuda=mosaic, default=xla)


@functools.partial(
  jax.jit, static_argnames=("options", "max_q_len", "implementation")
)
def _ragged_paged_attention(
  *args, options: Options, max_q_len: int | None, implementation: str
):
  xla = functools.partial(attention_xla.ragged_paged_attention, options=options)
  if implementation == "xla":
    return xla(*args)

  def mosaic(*args):
    *args, tree_mask, arrays = args
    more = dict(causal=options.causal, tree_mask=tree_mask)
    if max_q_len is not None:
      more |= arrays._asdict() | options.named(decode_kernel.OPTIONS)
      return short_queries.attend(*args, max_q_len=max_q_len, **more)
    more |= arrays._asdict() | options.named(ragged_kernel.OPTIONS)
    return ragged_kernel.attend(*args, **more)

  return lax.platform_dependent(*args, cuda=mosaic, default=xla)


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
  few = _why_not_few(q, k_pages, max_q_len)
  if few is None or max_q_len == 1:
    return few
  return ragged_config.unsupported(*_shape(q, k_pages), kv_dtype=k_pages.dtype)


def _why_not_few(q, k_pages, max_q_len: int | None) -> str | None:
  """Returns why the kernel of decode cannot take the queries, or None."""
  if max_q_len is None:
    return "there may be any number of queries."
  return decode_config.unsupported(
    *_shape(q, k_pages), kv_dtype=k_pages.dtype, max_q_len=max_q_len
  )


def _shape(q, k_pages):
  """Returns what both kernels are asked about."""
  _, num_kv_heads, page_size, head_dim = k_pages.shape
  return head_dim, page_size, q.shape[1], num_kv_heads, q.dtype
