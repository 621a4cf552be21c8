"""Decode: a few query tokens per sequence.

Speculative decoding verifies several draft tokens of each sequence at once.
Their queries become more columns of the decode kernel's tiles, so that K and V
are still read only once: column `t * group + g` is query head g of query token
t. A tree mask is packed into one word of bits per query token (`tree_bits`).
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
  """Attends the last tokens of each sequence over paged K and V.

  Args:
    q: Queries on the flat token axis, one sequence after the other.
    kv: See `kernel.paged_decode`.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this index on have no queries.
    arrays: Array options. Columns of `tree_mask` from `max_q_len` on are
      ignored. `alibi_slopes` must be None with a tree mask.
    max_q_len: Query tokens per sequence, at most; further tokens are not
      attended.
    spec: Static options. Without `causal`, a query sees all tokens of its
      sequence. For a tree mask with a window, see `tree_bits`.
    config: See `kernel.paged_decode`.
    interpret: See `kernel.paged_decode`.

  Returns:
    The output in the dtype of q and the natural log-sum-exp in f32; 0 and -inf
    for tokens that belong to no sequence or are not attended.

  Raises:
    NotImplementedError: If the kernel does not support the shapes or dtypes.
    ValueError: See `kernel.paged_decode`.
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

  # 1. Group the query tokens by sequence.
  q_lens, kv_lens = _lens(kv.kv_lens, cu_q_lens, num_active, max_q_len, spec)
  nth = jnp.arange(max_q_len, dtype=jnp.int32)
  token = jnp.clip(cu_q_lens[:-1, None] + nth[None], 0, num_tokens - 1)
  group = num_q_heads // num_kv_heads
  by_seq = q[token].reshape(num_seqs, max_q_len, num_kv_heads, group, head_dim)
  tree = None
  if arrays.tree_mask is not None:
    mask = arrays.tree_mask[token]
    tree = tree_bits.pack_few(mask, q_lens, spec.sliding_window)

  # 2. Attend: one item per sequence and KV head, one column per token and head.
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

  # 3. Ungroup: for each token, find its sequence and its index there.
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
  """Returns the numbers of query tokens and of stored tokens per sequence."""
  seq = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
  all_q_lens = jnp.where(seq < num_active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
  q_lens = jnp.clip(all_q_lens, 0, max_q_len)
  # Keep the first `max_q_len` query tokens, each at its position.
  if spec.causal:
    kv_lens -= all_q_lens - q_lens
  return q_lens, jnp.where(q_lens > 0, kv_lens, 0)
