"""Flax modules over a paged KV cache."""

from paged_jax.nn.nnx import PagedAttention
from paged_jax.nn.rotary import apply_rotary

__all__ = ["PagedAttention", "apply_rotary"]
