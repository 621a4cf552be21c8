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


class State(NamedTuple):
  """The state that steps carry on the device.

  All outputs of a step reuse the memory of its inputs, so each step's kernels
  have the same addresses as the step before. With one output elsewhere, a call
  took 0.9 ms instead of 0.7 (135M parameters, 8 rows, H200).
  """

  rows: Rows
  packed: jax.Array  # i32[3 or 4, num_seqs], the result of the step


@by_leaves
def prefill_step(model: DecoderModel, state: State, plan: Plan) -> State:
  """Runs `loop.prefill_step`, and packs the result."""
  rows, result = loop.prefill_step(model, state.rows, plan)
  return State(rows, _pack(result))


@by_leaves
def decode_step(model: DecoderModel, state: State) -> State:
  """Runs `loop.decode_step`, and packs the result."""
  rows, result = loop.decode_step(model, state.rows)
  return State(rows, _pack(result))


_copy = jax.jit(jnp.copy)


class Runner:
  """A model and its rows; each call dispatches one step and returns at once.

  Calls return a packed result, whose copy to the host has started; see
  `unpack`.
  """

  def __init__(self, model: DecoderModel, rows: Rows):
    self._structure, self._leaves = flatten(model)
    self._state = State(
      rows,
      jnp.zeros((4 if rows.with_logprobs else 3, rows.num_seqs), jnp.int32),
    )

  @property
  def rows(self) -> Rows:
    """The rows after the last dispatched step; the next step donates them."""
    return self._state.rows

  def prefill(self, plan: Plan) -> jax.Array:
    """Dispatches `prefill_step`."""
    return self._run(prefill_step, plan)

  def decode(self) -> jax.Array:
    """Dispatches `decode_step`."""
    return self._run(decode_step)

  def _run(self, program: Callable[..., State], *args: Plan) -> jax.Array:
    self._state = program(self._structure, self._leaves, self._state, *args)
    packed = _copy(self._state.packed)  # the next step overwrites it
    packed.copy_to_host_async()
    return packed


def _pack(result: Result) -> jax.Array:
  """Packs a result into one array, for one transfer."""
  parts = [result.tokens[:, 0], result.num_new, result.status]
  if result.logprobs is not None:
    bits = lax.bitcast_convert_type(result.logprobs[:, 0], jnp.int32)
    parts.append(bits)
  return jnp.stack(parts)


class HostResult(NamedTuple):
  """The result of one step, on the host."""

  tokens: np.ndarray  # i32[num_seqs], sampled
  num_new: np.ndarray  # i32[num_seqs], 1 if the token counts, else 0
  status: np.ndarray  # i32[num_seqs], a `Status`
  logprobs: np.ndarray | None  # f32[num_seqs]


def unpack(packed: np.ndarray) -> HostResult:
  """Unpacks the result of `prefill_step` or `decode_step`."""
  tokens, num_new, status, *bits = packed
  logprobs = bits[0].view(np.float32) if bits else None
  return HostResult(tokens, num_new, status, logprobs)
