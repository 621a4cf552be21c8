"""Rotary position embedding (Su et al., 2021, section 3.2), halves rotated."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rotary(
  x: Float[Array, "num_tokens num_heads head_dim"],
  positions: Int[Array, " num_tokens"],
  theta: float,
) -> Float[Array, "num_tokens num_heads head_dim"]:
  """Rotates each pair `(x[i], x[i + head_dim / 2])` by its position's angle.

  Angle of pair `i` at position `p`: `p * theta ** (-2 i / head_dim)`.

  Args:
    x: [num_tokens, num_heads, head_dim], queries or keys; head_dim is even.
    positions: i32[num_tokens].
    theta: Base of the frequencies.

  Returns:
    The rotated array, in the dtype of `x`; computed in float32.
  """
  half = x.shape[-1] // 2
  exponent = jnp.arange(half, dtype=jnp.float32) / half
  frequency = theta**-exponent
  angle = positions.astype(jnp.float32)[:, None] * frequency[None]
  cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
