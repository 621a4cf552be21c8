"""Times ops that take microseconds, as the steps of one compiled loop."""

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
  """Verifies the result of a loop, then times the loop.

  Args:
    step: Maps the number of the step, the state and the inputs to the next
      state.
    start: The state before each call, which gets a copy of it.
    num_steps: Number of steps in a call.
    num_calls: Number of calls to time.
    verify: Raises a RuntimeError if the state after one call is wrong.
    inputs: Arrays whose values must not be compiled into the program.
    large: Arrays of at least this many elements are reported by `memory`; None
      reports nothing.
    goes_on: Whether each call continues from the state of the previous one.
      `start` itself is then donated to the first call.

  Returns:
    The figures: times, numbers of steps and calls, and those of `memory`.
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
  """Returns the compiled loop of `measure`.

  It is compiled once, here; it raises an error if called with other shapes.
  """

  def run(state: State, inputs: tuple) -> State:
    return lax.fori_loop(0, num_steps, lambda i, s: step(i, s, *inputs), state)

  return jax.jit(run, donate_argnums=0).lower(start, inputs).compile()


def copy(state: State) -> State:
  """Returns a copy of the state, which can be donated."""
  return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def memory(program: jax.stages.Compiled, start: State, large: int) -> dict:
  """Returns the memory that a program needs.

  Args:
    program: The program, as returned by `compiled`.
    start: The state for which it was compiled.
    large: Least number of elements of a large array.

  Returns:
    The bytes of the state, of outputs that reuse its memory and of temporary
    memory, and the number of instructions that copy a large array of the state.

  Raises:
    RuntimeError: If the compiler does not show its program.
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
    figures: Figures, as returned by `measure` with `large`.
  """
  if figures["large_copies"] or (
    figures["in_place_bytes"] < figures["state_bytes"]
  ):
    raise RuntimeError(f"the state is not updated in place: {figures}")
