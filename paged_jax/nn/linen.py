"""Adapts a Flax Linen module and its variables to `DecoderModel`."""

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
  """A `DecoderModel` that consists of a Linen module and its variables.

  The module must have the attributes `layers`, `vocab_size` and `max_len`, a
  method `__call__(tokens, cache, step)` and a method `logits(hidden)`, as
  `paged_jax.models.contract.DecoderModel` describes them.

  Attributes:
    module: The Linen module; static.
    variables: The variables that `module.init` returned.
  """

  module: linen.Module = dataclasses.field(metadata=dict(static=True))
  variables: PyTree

  @property
  def layers(self) -> tuple[LayerKV, ...]:
    """The shape of each layer's keys and values."""
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
    """Returns the logits of the next token, from hidden states."""
    logits: Any = self.module.apply(self.variables, hidden, method="logits")
    return logits
