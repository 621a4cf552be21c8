"""Rotary position embedding (RoPE; Su et al., 2021, section 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rotary(
  x: Float[Array, "*tokens num_heads head_dim"],
  positions: Int[Array, "*positions"],
  theta: float,
) -> Float[Array, "*tokens num_heads head_dim"]:
  """Rotates each pair `(x[i], x[i + head_dim / 2])` by an angle.

  The angle of pair `i` at position `p` is `p * theta ** (-2 * i / head_dim)`.
  The pairs are those of the half-split layout, which Hugging Face's Llama uses.

  Args:
    x: [*tokens, num_heads, head_dim], queries or keys; head_dim is even.
    positions: i32, in the shape of `tokens` or of its last axes.
    theta: Base of the frequencies.

  Returns:
    The rotated array in the dtype of `x`, computed in float32.
  """
  half = x.shape[-1] // 2
  exponent = jnp.arange(half, dtype=jnp.float32) / half
  frequency = (theta**-exponent).reshape(*[1] * positions.ndim, half)
  angle = positions.astype(jnp.float32)[..., None] * frequency
  # Add the head axis, and the leading token axes that positions lack.
  missing = x.ndim - 1 - angle.ndim
  angle = angle.reshape(*[1] * missing, *angle.shape[:-1], 1, half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
