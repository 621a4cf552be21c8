"""Causal attention without a cache, for training and as a reference.

Plain JAX over contiguous keys and values, differentiable. It computes the
whole score matrix of each sequence.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.spec import AttentionArrays, AttentionSpec


def causal_attention(
  q: Array,
  k: Array,
  v: Array,
  arrays: AttentionArrays,
  spec: AttentionSpec,
) -> Array:
  """Returns attention of each token to itself and the tokens before it.

  Args:
    q: [..., length, num_q_heads, head_dim].
    k: [..., length, num_kv_heads, head_dim].
    v: Values, like `k`.
    arrays: The array options; `tree_mask` must be None.
    spec: The static options.

  Returns:
    [..., length, num_q_heads, head_dim], in the dtype of `q`.
  """
  *batch, length, num_q_heads, head_dim = q.shape
  num_kv_heads = k.shape[-2]
  group = num_q_heads // num_kv_heads
  grouped = q.reshape(*batch, length, num_kv_heads, group, head_dim)
  s = spec.scale * jnp.einsum(
    "...qhgd,...khd->...hgqk", grouped, k, preferred_element_type=jnp.float32
  )
  if (cap := spec.logits_soft_cap) is not None:
    s = cap * jnp.tanh(s / cap)
  axes = [1] * (len(batch) + 2)  # leading axes of s, before queries and keys
  position = jnp.arange(length, dtype=jnp.int32)
  distance = position[None] - position[:, None]  # key minus query
  distance = distance.reshape(*axes, length, length)
  per_head = lambda x: x.astype(jnp.float32).reshape(
    *axes[2:], num_kv_heads, group, 1, 1
  )
  if arrays.alibi_slopes is not None:
    s += per_head(arrays.alibi_slopes) * distance.astype(jnp.float32)
  visible = distance <= 0
  if spec.sliding_window is not None:
    in_window = distance > -spec.sliding_window
    is_sink = position < spec.num_sink_tokens
    visible &= in_window | is_sink.reshape(*axes, 1, length)
  s = jnp.where(visible, s, -jnp.inf)
  if arrays.sinks is None:
    p = jax.nn.softmax(s, axis=-1)
  else:
    sinks = jnp.broadcast_to(per_head(arrays.sinks), (*s.shape[:-1], 1))
    p = jax.nn.softmax(jnp.concatenate([s, sinks], axis=-1), axis=-1)
    p = p[..., :-1]
  out = jnp.einsum(
    "...hgqk,...khd->...qhgd",
    p.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(q.shape).astype(q.dtype)
