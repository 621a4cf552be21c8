"""The compiled programs that the host dispatches, one for each step.

A model is flattened once, and its leaves are passed as a tuple of arrays: a
jitted function that takes an NNX module flattens it in Python at each call,
which takes 2 to 3 ms (30 to 32 layers, H200). A step has no loop and no branch
on a value of the device, so the call returns long before the step ends, and
several steps can be queued.
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

  As a static argument of jit, it is compared by identity, which takes the same
  time for models of any size.
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
  """Compiles `run(model, state, ...)` as a function of the model's leaves.

  Returns:
    The jitted function of `(structure, leaves, state, ...)`. It donates the
    state.
  """

  def compiled(structure, leaves, state, *args):
    return run(structure.model(leaves), state, *args)

  compiled.__name__ = run.__name__  # names the program
  # Unused inputs are kept, because outputs reuse their memory.
  return jax.jit(compiled, static_argnums=0, donate_argnums=2, keep_unused=True)


@by_leaves
def prefill_step(
  model: DecoderModel, rows: Rows, plan: Plan
) -> tuple[Rows, jax.Array]:
  """Runs `loop.prefill_step`, and packs the result."""
  rows, result = loop.prefill_step(model, rows, plan)
  return rows, _pack(result)


@by_leaves
def decode_step(model: DecoderModel, rows: Rows) -> tuple[Rows, jax.Array]:
  """Runs `loop.decode_step`, and packs the result."""
  rows, result = loop.decode_step(model, rows)
  return rows, _pack(result)


class Runner:
  """A model and its rows; each call dispatches one step and returns at once.

  Calls return a packed result, in the memory of the host; see `unpack`.

  Attributes:
    rows: The rows after the last dispatched step. The next step donates them.
  """

  def __init__(self, model: DecoderModel, rows: Rows):
    self._structure, self._leaves = flatten(model)
    self.rows = rows

  def prefill(self, plan: Plan) -> jax.Array:
    """Dispatches `prefill_step`."""
    self.rows, packed = prefill_step(
      self._structure, self._leaves, self.rows, plan
    )
    return packed

  def decode(self) -> jax.Array:
    """Dispatches `decode_step`."""
    self.rows, packed = decode_step(self._structure, self._leaves, self.rows)
    return packed


def _pack(result: Result) -> jax.Array:
  """Packs a result into one array in the memory of the host.

  All outputs on the device reuse the memory of inputs, so each step's kernels
  have the same addresses as the step before. With a small output elsewhere, XLA
  updates the CUDA graph of the step when the address changes, which takes 1.8
  ms (547 kernels, H200).
  """
  parts = [result.tokens[:, 0], result.num_new, result.status]
  if result.logprobs is not None:
    bits = lax.bitcast_convert_type(result.logprobs[:, 0], jnp.int32)
    parts.append(bits)
  return jax.device_put(jnp.stack(parts), jax.memory.Space.Host)


class HostResult(NamedTuple):
  """The result of one step, on the host."""

  tokens: np.ndarray  # i32[num_seqs], sampled
  num_new: np.ndarray  # i32[num_seqs], 1 if the token counts, else 0
  status: np.ndarray  # i32[num_seqs], a `Status`
  logprobs: np.ndarray | None  # f32[num_seqs]


def unpack(packed: np.ndarray) -> HostResult:
  """Unpacks the result of `prefill_step` or `decode_step`.

  Args:
    packed: i32[3, num_seqs], or i32[4, num_seqs] with log-probabilities.
  """
  tokens, num_new, status, *bits = packed
  logprobs = bits[0].view(np.float32) if bits else None
  return HostResult(tokens, num_new, status, logprobs)
