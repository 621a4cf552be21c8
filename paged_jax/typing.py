"""The type of an array field of a pytree dataclass."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax import Array as Leaf
else:
  # JAX stores tracers, shapes, shardings and plain objects in the fields when
  # it maps over a pytree, so a run-time check must accept any type.
  Leaf = Any

__all__ = ["Leaf"]
