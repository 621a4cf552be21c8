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
from jaxtyping import Array, Float, Int

from pallas_kernels.common import tree_bits
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec
from pallas_kernels.decode import kernel
from pallas_kernels.decode.config import Config, unsupported


@functools.partial(
  jax.jit, static_argnames=("max_q_len", "spec", "config", "interpret")
)
def attend(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  kv: PagedKV,
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  arrays: AttentionArrays,
  *,
  max_q_len: int,
  spec: AttentionSpec,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float[Array, "num_tokens num_q_heads"],
]:
  """Attends the last tokens of each sequence over pages.

  Args:
    q: Queries of all sequences, one sequence after the other.
    kv: See `paged_decode`.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this one on have no queries.
    arrays: See `paged_decode`. Of the tree mask, the first `max_q_len` columns
      count; there are no slopes with it.
    max_q_len: Most query tokens of a sequence; the rest is not attended.
    spec: See `paged_decode`. Without `causal`, a query sees all tokens of its
      sequence, and there is no window; with a mask and a window, see
      `tree_bits`.
    config: See `paged_decode`.
    interpret: See `paged_decode`.

  Returns:
    The output and the natural log-sum-exp; 0 and -inf for tokens of no
    sequence.

  Raises:
    NotImplementedError: If the kernel does not take these shapes.
    ValueError: See `paged_decode`.
  """
  num_tokens, num_q_heads, head_dim = q.shape
  num_seqs, num_kv_heads = kv.num_seqs, kv.num_kv_heads
  if reason := unsupported(
    head_dim,
    kv.page_size,
    num_q_heads,
    num_kv_heads,
    q.dtype,
    kv_dtype=kv.k.dtype,
    max_q_len=max_q_len,
  ):
    raise NotImplementedError(reason)
  if 0 in (num_tokens, num_seqs):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)

  # 1. From the token axis to items: the query tokens of each sequence.
  q_lens, kv_lens = _lens(kv.kv_lens, cu_q_lens, num_active, max_q_len, spec)
  nth = jnp.arange(max_q_len, dtype=jnp.int32)
  token = jnp.clip(cu_q_lens[:-1, None] + nth[None], 0, num_tokens - 1)
  group = num_q_heads // num_kv_heads
  by_seq = q[token].reshape(num_seqs, max_q_len, num_kv_heads, group, head_dim)
  tree = None
  if arrays.tree_mask is not None:
    mask = arrays.tree_mask[token]
    tree = tree_bits.pack_few(mask, q_lens, spec.sliding_window)

  # 2. Attend.
  items = num_seqs, num_kv_heads, max_q_len * group
  out, lse = kernel.attend(
    by_seq.swapaxes(1, 2).reshape(*items, head_dim),
    q_lens if max_q_len > 1 or tree is not None else None,
    kv._replace(kv_lens=kv_lens),
    arrays,
    spec=spec,
    config=config,
    interpret=interpret,
    max_q_len=max_q_len,
    tree=tree,
  )

  # 3. Back to the token axis: the sequence of each token, and its place there.
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


def _lens(kv_lens, cu_q_lens, num_active, max_q_len, spec):
  """Returns the query tokens and the tokens stored of each sequence."""
  seq = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
  all_q_lens = jnp.where(seq < num_active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
  q_lens = jnp.clip(all_q_lens, 0, max_q_len)
  if spec.causal:  # the first query tokens stay, at their positions
    kv_lens -= all_q_lens - q_lens
  return q_lens, jnp.where(q_lens > 0, kv_lens, 0)
