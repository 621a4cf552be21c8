"""Feed-forward layers."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class GatedMLP(nnx.Module):
  """SwiGLU MLP (Shazeer, 2020): `down(silu(gate(x)) * up(x))`.

  `gate_up_proj` computes both projections in one product. Its kernel has shape
  `[hidden_size, 2, intermediate_size]`, so a shard of the last axis has
  matching columns of gate and up.
  """

  def __init__(
    self,
    hidden_size: int,
    intermediate_size: int,
    *,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    options = dict(use_bias=False, param_dtype=param_dtype, rngs=rngs)
    self.gate_up_proj = nnx.LinearGeneral(
      hidden_size, (2, intermediate_size), **options
    )
    self.down_proj = nnx.Linear(intermediate_size, hidden_size, **options)

  def __call__(
    self, x: Float[Array, "*tokens hidden_size"]
  ) -> Float[Array, "*tokens hidden_size"]:
    """Returns the output in the shape of `x`."""
    gate_up = self.gate_up_proj(x)
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return self.down_proj(jax.nn.silu(gate) * up)
