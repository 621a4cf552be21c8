"""A Flax Linen module with its parameters, as a model of the loops."""

import dataclasses
from typing import Any

import jax
from flax import linen
from jaxtyping import Array, PyTree

from paged_jax.kv.cache import PagedCache
from paged_jax.kv.layout import LayerKV
from paged_jax.kv.step import Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinenDecoder:
  """A `DecoderModel` made of a Linen module and its variables.

  The module has `layers`, `vocab_size` and `max_len` as attributes, a method
  `__call__(tokens, cache, step)` and a method `logits(hidden)`; see
  `paged_jax.models.contract.DecoderModel`.
  """

  module: linen.Module = dataclasses.field(metadata=dict(static=True))
  variables: PyTree

  @property
  def layers(self) -> tuple[LayerKV, ...]:
    """What the cache must know of each layer."""
    return self.module.layers

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.module.vocab_size

  @property
  def max_len(self) -> int:
    """Longest sequence, in tokens."""
    return self.module.max_len

  def __call__(
    self, tokens: Array, cache: PagedCache | None, step: Step | None
  ) -> tuple[Array, PagedCache | None]:
    """Returns the hidden states of a step's tokens, and the next cache."""
    result: Any = self.module.apply(self.variables, tokens, cache, step)
    return result

  def logits(self, hidden: Array) -> Array:
    """Returns the logits of hidden states."""
    logits: Any = self.module.apply(self.variables, hidden, method="logits")
    return logits
