"""Self-attention over a paged KV cache, as a Flax NNX module."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from paged_jax.kv.cache import PagedCache
from paged_jax.kv.step import Step
from paged_jax.nn.rotary import apply_rotary
from paged_jax.ops.layer import attend_layer


class PagedAttention(nnx.Module):
  """Grouped-query causal attention: projections, rotary, `attend_layer`.

  The cache is an argument and a result and is never mutated, so the module
  works inside jit, scan and while_loop.

  Example:
    cache, step = begin_step(cache, q_lens, num_tokens=x.shape[0])
    y, cache = attention(x, cache, step)
  """

  def __init__(
    self,
    hidden_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    layer: int,
    rope_theta: float | None = 10_000.0,
    sliding_window: int | None = None,
    num_sink_tokens: int = 0,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Sequence[float] | None = None,
    batch_invariant: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Creates the projections.

    Args:
      hidden_size: Width of the input and the output.
      num_q_heads: Number of query heads, a multiple of `num_kv_heads`.
      num_kv_heads: Number of key and value heads.
      head_dim: Width of one head; even.
      layer: Index of the layer in `model.layers`.
      rope_theta: Base of the rotary frequencies; None applies no rotary
        embedding.
      sliding_window: See `attend_layer`.
      num_sink_tokens: See `attend_layer`.
      logits_soft_cap: See `attend_layer`.
      scale: See `attend_layer`.
      alibi_slopes: Constant slopes, one for each query head. In Press et al.
        (2022), head `i` of `n` has the slope `2 ** (-8 * (i + 1) / n)` if `n`
        is a power of two. Models with ALiBi set `rope_theta=None`.
      batch_invariant: See `attend_layer`.
      dtype: Dtype of the projections; None promotes the dtypes of the input and
        the parameters.
      param_dtype: Dtype of the parameters.
      rngs: Random numbers for the initial parameters.

    Raises:
      ValueError: If `num_q_heads` is not a multiple of `num_kv_heads`,
        `head_dim` is odd, or `alibi_slopes` does not have one entry for each
        query head.
    """
    if num_q_heads % num_kv_heads:
      raise ValueError(f"{num_q_heads=} must be a multiple of {num_kv_heads=}.")
    if head_dim % 2:
      raise ValueError(f"{head_dim=} must be even.")
    if alibi_slopes is not None and len(alibi_slopes) != num_q_heads:
      raise ValueError(
        f"{alibi_slopes=} must have one entry for each of {num_q_heads=}."
      )
    self.num_q_heads = num_q_heads
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    self.layer = layer
    self.rope_theta = rope_theta
    self.scale = scale
    self.sliding_window = sliding_window
    self.num_sink_tokens = num_sink_tokens
    self.logits_soft_cap = logits_soft_cap
    # A tuple, not an array, so that no optimiser, checkpoint or cast changes
    # the slopes.
    self.alibi_slopes = None
    if alibi_slopes is not None:
      self.alibi_slopes = tuple(map(float, alibi_slopes))
    self.batch_invariant = batch_invariant
    linear = dict(
      use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    num_heads = num_q_heads + 2 * num_kv_heads
    # One product for q, k and v: three small ones take longer at decode. The
    # columns are ordered by KV head (its query heads, its key, its value), so
    # that a shard of whole KV heads is a contiguous slice.
    self.qkv_proj = nnx.Linear(hidden_size, num_heads * head_dim, **linear)
    self.o_proj = nnx.Linear(num_q_heads * head_dim, hidden_size, **linear)

  def __call__(
    self,
    x: Float[Array, "*tokens hidden_size"],
    cache: PagedCache | None,
    step: Step | None,
  ) -> tuple[Float[Array, "*tokens hidden_size"], PagedCache | None]:
    """Returns the output, and the cache with this layer's K and V written.

    Args:
      x: [num_tokens, hidden_size], the tokens of the step; or
        [batch, length, hidden_size] after `begin_padded`.
      cache: The cache; see `attend_layer`. If None, each sequence attends to
        itself only.
      step: The step that `begin_step` or `begin_padded` returned; None if
        `cache` is None.

    Returns:
      The output in the shape of `x`, and the next cache.

    Raises:
      ValueError: See `attend_layer`.
      NotImplementedError: See `attend_layer`.
    """
    tokens = x.shape[:-1]
    qkv = self.qkv_proj(x).reshape(*tokens, self.num_kv_heads, -1)
    group = self.num_q_heads // self.num_kv_heads
    qkv = qkv.reshape(*tokens, self.num_kv_heads, group + 2, self.head_dim)
    q = qkv[..., :group, :].reshape(*tokens, self.num_q_heads, self.head_dim)
    k, v = qkv[..., group, :], qkv[..., group + 1, :]
    if self.rope_theta is not None:
      length = tokens[-1]
      positions = (
        jnp.arange(length, dtype=jnp.int32) if step is None else step.positions
      )
      q = apply_rotary(q, positions, self.rope_theta)
      k = apply_rotary(k, positions, self.rope_theta)
    slopes = self.alibi_slopes
    if slopes is not None:
      slopes = jnp.asarray(slopes, jnp.float32)
    out, cache = attend_layer(
      q,
      k,
      v,
      cache,
      step,
      self.layer,
      scale=self.scale,
      sliding_window=self.sliding_window,
      num_sink_tokens=self.num_sink_tokens,
      logits_soft_cap=self.logits_soft_cap,
      batch_invariant=self.batch_invariant,
      alibi_slopes=slopes,
    )
    return self.o_proj(out.reshape(*tokens, -1)), cache
