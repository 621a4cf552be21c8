"""A few query tokens a sequence, by the decode kernel.

Speculative decoding verifies some draft tokens of each sequence at once. Their
queries are more columns of the kernel's tiles, so that K and V are still read
only once: column `t * group + g` is query head g of token t of the sequence.
What a token of a tree sees of the others is a word of bits (`tree_bits`).
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from pallas_kernels.common import tree_bits
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import kernel


@functools.partial(
  jax.jit,
  static_argnames=(
    "max_q_len",
    "causal",
    *kernel.OPTIONS,
    "config",
    "interpret",
  ),
)
def attend(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""],
  *,
  max_q_len: int,
  sinks: Float[Array, " num_q_heads"] | None,
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
  causal: bool = True,
  tree_mask: Bool[Array, "num_tokens max_new"] | None = None,
  sliding_window: int | None,
  k_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  config: decode_config.Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
  **options,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float[Array, "num_tokens num_q_heads"],
]:
  """Attends the last tokens of each sequence over pages.

  Args:
    q: queries of all sequences, one sequence after the other.
    k_pages: see `paged_decode`.
    v_pages: see `paged_decode`.
    kv_lens: see `paged_decode`.
    page_indices: see `paged_decode`.
    cu_q_lens: offsets of the sequences on the token axis.
    num_active: sequences from this one on have no queries.
    max_q_len: most query tokens of a sequence; the rest is not attended.
    sinks: see `paged_decode`.
    alibi_slopes: see `paged_decode`; none with a mask.
    causal: whether a query sees no position past its own; if not, it sees all
      tokens of its sequence, and there is no window.
    tree_mask: which of the query tokens of its sequence a token sees, of the
      first `max_q_len`, instead; or None.
    sliding_window: see `paged_decode`; with a mask, see `tree_bits`.
    k_scales: see `paged_decode`.
    v_scales: see `paged_decode`.
    config: see `paged_decode`.
    interpret: see `paged_decode`.
    options: see `paged_decode`.

  Returns:
    The output and the natural log-sum-exp; 0 and -inf for tokens of no
    sequence.

  Raises:
    NotImplementedError: if the kernel does not take these shapes.
    ValueError: see `paged_decode`.
  """
  num_tokens, num_q_heads, head_dim = q.shape
  _, num_kv_heads, page_size, _ = k_pages.shape
  if reason := decode_config.unsupported(
    head_dim,
    page_size,
    num_q_heads,
    num_kv_heads,
    q.dtype,
    kv_dtype=k_pages.dtype,
    max_q_len=max_q_len,
  ):
    raise NotImplementedError(reason)
  num_seqs = kv_lens.shape[0]
  if 0 in (num_tokens, num_seqs):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  seq = jnp.arange(num_seqs, dtype=jnp.int32)
  all_q_lens = jnp.where(seq < num_active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
  q_lens = jnp.clip(all_q_lens, 0, max_q_len)
  if causal:  # the first query tokens stay, at their positions
    kv_lens -= all_q_lens - q_lens
  kv_lens = jnp.where(q_lens > 0, kv_lens, 0)
  nth = jnp.arange(max_q_len, dtype=jnp.int32)
  token = jnp.clip(cu_q_lens[:-1, None] + nth[None], 0, num_tokens - 1)
  group = num_q_heads // num_kv_heads
  by_seq = q[token].reshape(num_seqs, max_q_len, num_kv_heads, group, head_dim)
  tree = None
  if tree_mask is not None:
    tree = tree_bits.pack_few(tree_mask[token], q_lens, sliding_window)
  items = num_seqs, num_kv_heads, max_q_len * group
  out, lse = kernel.attend(
    by_seq.swapaxes(1, 2).reshape(*items, head_dim),
    q_lens if max_q_len > 1 or tree is not None else None,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    max_q_len=max_q_len,
    causal=causal,
    tree=tree,
    sliding_window=sliding_window,
    sinks=sinks,
    alibi_slopes=alibi_slopes,
    scales=(k_scales, v_scales),
    config=config,
    interpret=interpret,
    **options,
  )

  # Back to the token axis: the sequence of each token, and its place there.
  position = jnp.arange(num_tokens, dtype=jnp.int32)
  passed = cu_q_lens[None, 1:] <= position[:, None]
  seq = jnp.minimum(jnp.sum(passed, axis=1, dtype=jnp.int32), num_seqs - 1)
  nth = position - cu_q_lens[seq]
  exists = (nth >= 0) & (nth < q_lens[seq])
  at = seq, slice(None), jnp.clip(nth, 0, max_q_len - 1)

  def by_token(x, otherwise):
    x = x.reshape(num_seqs, num_kv_heads, max_q_len, group, *x.shape[3:])
    x = x[at].reshape(num_tokens, num_q_heads, *x.shape[4:])
    keep = exists.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep, x, jnp.asarray(otherwise, x.dtype))

  return by_token(out, 0), by_token(lse, -jnp.inf)
