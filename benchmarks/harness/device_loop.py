"""Times what takes microseconds: many steps in one compiled loop."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.harness.timing import spread_p99

State = Any


def measure(
  step: Callable[..., State],
  start: State,
  num_steps: int,
  num_calls: int,
  verify: Callable[[State], None],
  *,
  inputs: tuple = (),
  large: int | None = None,
  goes_on: bool = False,
) -> dict:
  """Verifies what a loop does, then times it.

  Args:
    step: From the number of the step, the state and the inputs to the next
      state.
    start: The state that every call starts from; a copy of it is donated.
    num_steps: Steps of one call.
    num_calls: Calls to time.
    verify: Raises an error if the state after one call is wrong.
    inputs: Arrays that the compiler must not know the values of.
    large: Elements from which on an array is one of those that `memory` is
      about; nothing is said about memory if left out.
    goes_on: Whether a call starts from where the last ended, and `start`
      itself is donated to the first.
  """
  program = compiled(step, start, num_steps, inputs)
  figures = {} if large is None else memory(program, start, large)
  if not goes_on:
    verify(program(copy(start), inputs))
    state = start
  else:
    state = program(start, inputs)
    verify(state)
  us = []
  for _ in range(num_calls):
    state = state if goes_on else copy(start)
    begin = time.perf_counter()
    state = jax.block_until_ready(program(state, inputs))
    us.append((time.perf_counter() - begin) / num_steps * 1e6)
  return {
    "us": spread_p99(us),
    "steps": num_steps,
    "calls": num_calls,
    **figures,
  }


def compiled(
  step: Callable[..., State], start: State, num_steps: int, inputs: tuple = ()
) -> jax.stages.Compiled:
  """Returns a program that takes the steps; see `measure`.

  It is compiled here, once: called with other shapes, it raises.
  """

  def run(state: State, inputs: tuple) -> State:
    return lax.fori_loop(0, num_steps, lambda i, s: step(i, s, *inputs), state)

  return jax.jit(run, donate_argnums=0).lower(start, inputs).compile()


def copy(state: State) -> State:
  """Returns a copy, to be donated."""
  return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def memory(program: jax.stages.Compiled, start: State, large: int) -> dict:
  """Returns what memory a program needs beside its state.

  Args:
    program: As from `compiled`.
    start: The state that it was compiled for.
    large: Elements from which on arrays of the state are large.

  Returns:
    Bytes of the state, of what is returned in its place, and of temporary
    memory, and how many instructions copy a large array.

  Raises:
    RuntimeError: If the program cannot be read.
  """
  leaves = jax.tree.leaves(start)
  shapes = {leaf.shape for leaf in leaves if leaf.size >= large}
  shapes |= {(math.prod(shape),) for shape in shapes}
  num_copies, text = 0, program.as_text()
  if text is None:
    raise RuntimeError("the compiler does not show its program")
  for line in text.splitlines():
    if " copy(" in line or " copy-start(" in line:
      shape = line.split(" copy")[0].split("[")[1].split("]")[0]
      num_copies += tuple(int(n) for n in shape.split(",") if n) in shapes
  size: Any = program.memory_analysis()
  return {
    "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    "in_place_bytes": size.alias_size_in_bytes,
    "temp_bytes": size.temp_size_in_bytes,
    "large_copies": num_copies,
  }


def check_in_place(figures: dict) -> None:
  """Raises a RuntimeError if a loop does not update its state in place.

  Args:
    figures: As from `measure` with `large`.
  """
  if figures["large_copies"] or (
    figures["in_place_bytes"] < figures["state_bytes"]
  ):
    raise RuntimeError(f"the state is not updated in place: {figures}")
