"""Feed-forward layers."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class GatedMLP(nnx.Module):
  """`down(silu(gate(x)) * up(x))` (Shazeer, 2020), gate and up as one product.

  The kernel of `gate_up_proj` is `[hidden_size, 2, intermediate_size]`, so that
  a shard of its last axis has the gates and the ups that belong together.
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
    """Returns the update of the residual stream."""
    gate_up = self.gate_up_proj(x)
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return self.down_proj(jax.nn.silu(gate) * up)
