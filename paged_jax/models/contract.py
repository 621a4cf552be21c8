"""The interface of a model that the generation loops can run.

The loops depend on this interface and on no model class. A model is a pytree:
an NNX module, or a Linen module with its variables
(`paged_jax.nn.linen.LinenDecoder`).
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged_jax.kv.cache import PagedCache
from paged_jax.kv.layout import LayerKV
from paged_jax.kv.step import Step


@runtime_checkable
class DecoderModel(Protocol):
  """A decoder-only language model over a paged cache."""

  @property
  def layers(self) -> tuple[LayerKV, ...]:
    """The shape of each layer's keys and values."""
    ...

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    ...

  @property
  def max_len(self) -> int:
    """Longest sequence that the model supports, in tokens."""
    ...

  def __call__(
    self, tokens: Array, cache: PagedCache | None, step: Step | None
  ) -> tuple[Array, PagedCache | None]:
    """Runs the tokens of one step.

    Args:
      tokens: i32[num_tokens], in the order of the step.
      cache: The cache that `begin_step` returned. If None, the model computes
        plain causal attention over tokens [..., length] and can be
        differentiated.
      step: The step that `begin_step` returned; None if `cache` is None.

    Returns:
      Hidden states [num_tokens, width], and the next cache, in which every
      layer has written its keys and values (None without a cache).
    """
    ...

  def logits(self, hidden: Array) -> Array:
    """Returns f32[..., vocab_size], the logits of the next token.

    Args:
      hidden: [..., width], any rows of the hidden states that a call returned.
    """
    ...


def check(model: DecoderModel) -> None:
  """Raises a TypeError if an object lacks an attribute of `DecoderModel`."""
  for name in ("layers", "vocab_size", "max_len", "logits", "__call__"):
    if not hasattr(model, name):
      raise TypeError(
        f"{type(model).__name__} lacks {name!r}: it is not a DecoderModel."
      )


def check_leaves(model: DecoderModel) -> None:
  """Raises a TypeError if a model is not a pytree of arrays."""
  for leaf in jax.tree.leaves(model):
    if not isinstance(leaf, jax.Array | np.ndarray):
      raise TypeError(
        f"{type(model).__name__} must be a pytree of arrays, as an nnx.Module "
        f"is; it has a leaf of type {type(leaf).__name__}."
      )


def run(
  model: DecoderModel, tokens: Array, cache: PagedCache, step: Step
) -> tuple[Array, PagedCache]:
  """Calls the model, and checks what it returns.

  Returns:
    The hidden states [num_tokens, width], and the next cache.

  Raises:
    TypeError: If the model lacks an attribute of `DecoderModel`.
    ValueError: If `model.layers` are not the layers of the cache, or if the
      model does not return hidden states [num_tokens, width] and the cache with
      the keys and values of every group written.
  """
  check(model)
  name = type(model).__name__
  if tuple(model.layers) != cache.layers:
    raise ValueError(
      f"{name}.layers={tuple(model.layers)} must be those of the cache, "
      f"{cache.layers}."
    )
  result = model(tokens, cache, step)
  if not isinstance(result, tuple) or len(result) != 2:
    raise ValueError(f"{name} must return (hidden, cache), got {result!r}.")
  hidden, after = result
  if not isinstance(after, PagedCache):
    raise ValueError(
      f"{name} must return the cache that it was given, with its layers "
      f"written; got {type(after).__name__}."
    )
  shape, num_tokens = getattr(hidden, "shape", None), tokens.shape[0]
  if shape is None or len(shape) != 2 or shape[0] != num_tokens:
    raise ValueError(
      f"{name} returned hidden of shape {shape}; it must be "
      f"({num_tokens}, width)."
    )
  _check_cache(name, cache, after)
  return hidden, after


def logits(model: DecoderModel, hidden: Array) -> Array:
  """Returns the logits f32[num_rows, vocab_size] of hidden states, checked.

  Args:
    model: The model.
    hidden: [num_rows, width], rows of the hidden states.

  Raises:
    ValueError: If the model returns another shape or dtype.
  """
  name = type(model).__name__
  result = model.logits(hidden)
  kind = getattr(result, "dtype", type(result).__name__)
  if kind != jnp.float32:
    raise ValueError(f"{name}.logits returned {kind}; it must be float32.")
  shape = hidden.shape[0], model.vocab_size
  if result.shape != shape:
    raise ValueError(
      f"{name}.logits returned shape {result.shape}; it must be {shape}."
    )
  return result


def _check_cache(name: str, before: PagedCache, after: PagedCache) -> None:
  """Raises a ValueError if `after` is not `before` with every group written."""
  spec = lambda cache: jax.tree.map(lambda x: (x.shape, x.dtype), cache)
  if spec(before) != spec(after):
    raise ValueError(
      f"{name} must return the cache that it was given, with its layers "
      "written; got one of another layout."
    )
  for i, (old, new) in enumerate(zip(before.groups, after.groups, strict=True)):
    if old.pool.k is new.pool.k:
      raise ValueError(
        f"{name} returned a cache in which no layer of group {i} has written: "
        "return the cache of the last `attend_layer`."
      )
