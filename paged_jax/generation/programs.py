"""The compiled programs that the host dispatches, one step each.

A model is flattened once, and its leaves are passed as a tuple of arrays: a
jitted function that takes an NNX module flattens it in Python at each call,
which takes 2 to 3 ms (30 to 32 layers, H200). A step is straight-line: there is
no loop and no branch on a value of the device, so the call returns long before
the step ends, and steps queue up.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_jax.generation import loop
from paged_jax.generation.rows import Plan, Result, Rows
from paged_jax.models.contract import DecoderModel


class Structure:
  """The structure of a model; models of equal structure share one object.

  As a static argument it is compared by identity, which costs nothing however
  large the model.
  """

  def __init__(self, treedef: jax.tree_util.PyTreeDef):
    self._treedef = treedef

  def model(self, leaves: tuple[jax.Array, ...]) -> DecoderModel:
    """Returns the model with these leaves."""
    return jax.tree.unflatten(self._treedef, leaves)


def flatten(
  model: DecoderModel,
) -> tuple[Structure, tuple[jax.Array, ...]]:
  """Returns the structure and the arrays of a model."""
  leaves, treedef = jax.tree.flatten(model)
  return _structure(treedef), tuple(leaves)


@functools.lru_cache(maxsize=64)
def _structure(treedef: jax.tree_util.PyTreeDef) -> Structure:
  return Structure(treedef)


def by_leaves[R](run: Callable[..., R]) -> Callable[..., R]:
  """Compiles `run(model, rows, ...)` as a function of leaves; donates the rows.

  Returns:
    The jitted function of `(structure, leaves, rows, ...)`.
  """

  def compiled(structure, leaves, rows, *args):
    return run(structure.model(leaves), rows, *args)

  compiled.__name__ = run.__name__  # of the program
  return jax.jit(compiled, static_argnums=0, donate_argnums=2)


@by_leaves
def prefill_step(
  model: DecoderModel, rows: Rows, plan: Plan
) -> tuple[Rows, jax.Array]:
  """Runs `loop.prefill_step`, and returns the packed result."""
  rows, result = loop.prefill_step(model, rows, plan)
  return rows, _pack(result)


@by_leaves
def decode_step(model: DecoderModel, rows: Rows) -> tuple[Rows, jax.Array]:
  """Runs `loop.decode_step`, and returns the packed result."""
  rows, result = loop.decode_step(model, rows)
  return rows, _pack(result)


def _pack(result: Result) -> jax.Array:
  """Returns one array of a result, for one transfer."""
  parts = [result.tokens[:, 0], result.num_new, result.status]
  if result.logprobs is not None:
    bits = lax.bitcast_convert_type(result.logprobs[:, 0], jnp.int32)
    parts.append(bits)
  return jnp.stack(parts)


class HostResult(NamedTuple):
  """What one step did, on the host."""

  tokens: np.ndarray  # i32[num_seqs], sampled
  num_new: np.ndarray  # i32[num_seqs], 0 or 1 of `tokens`
  status: np.ndarray  # i32[num_seqs]
  logprobs: np.ndarray | None  # f32[num_seqs]


def unpack(packed: np.ndarray) -> HostResult:
  """Returns the result that `prefill_step` or `decode_step` packed."""
  tokens, num_new, status, *bits = packed
  logprobs = bits[0].view(np.float32) if bits else None
  return HostResult(tokens, num_new, status, logprobs)
