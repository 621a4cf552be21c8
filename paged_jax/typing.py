"""The type of a field that holds an array in a pytree dataclass."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax import Array as Leaf
else:
  # JAX itself puts tracers, shapes, shardings and plain objects in the fields
  # while it maps over a pytree: no run-time check may insist on an array.
  Leaf = Any

__all__ = ["Leaf"]
