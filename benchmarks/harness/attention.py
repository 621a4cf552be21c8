"""Loops of attention calls: their times, and the errors of their outputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import paged_jax
from benchmarks.harness import device_loop
from benchmarks.harness.batches import Batch, Sizes, num_bytes

MAX_ERROR = 1e-2
# Estimates, to choose the number of calls in a loop.
GUESS = 4e6  # bytes read in a microsecond
CALL_COST = 10  # least microseconds of a call


def decode(
  sizes: Sizes, implementation: str | None = None, **options
) -> Callable[..., Any]:
  """Returns decode attention, with `sizes.implementation` if None."""
  return functools.partial(
    paged_jax.paged_attention,
    implementation=implementation or sizes.implementation,
    **options,
  )


def no_attention(q, k_pages, v_pages, kv_lens, page_indices):
  """Reads a page table and no keys, to time a loop without attention."""
  num_pages = jnp.sum(page_indices, axis=1) + kv_lens
  return jnp.where(num_pages[:, None, None] < 0, jnp.zeros_like(q), q)


def timed(
  sizes: Sizes,
  batch: Batch,
  attend: Callable[..., Any],
  num_tokens: float,
  check: Callable[[jax.Array], float] | None,
  *,
  slow: bool = False,
) -> tuple[dict, jax.Array]:
  """Verifies and times calls of an op, in a loop of about `sizes.loop_us`.

  Args:
    sizes: Sizes of the benchmark.
    batch: The sequences and queries.
    attend: Maps query, pools, lengths, a table and `batch.more` to the output.
    num_tokens: Visible keys of all sequences.
    check: Maps the last output to its error, and raises a RuntimeError if it is
      wrong. None checks nothing.
    slow: Whether the loop has only a fiftieth of the steps.

  Returns:
    The figures, and the output of the last step, which uses the first table.
  """
  guess = num_bytes(sizes, num_tokens) / GUESS + CALL_COST
  steps = max(1, round(sizes.loop_us / guess / (50 if slow else 1)))
  num_loops = sizes.slow_loops if slow else sizes.num_loops
  figures, out = measured(batch, attend, steps, num_loops, check)
  figures["gb_per_s"] = gb_per_s(sizes, num_tokens, figures)
  return figures, out


def measured(
  batch: Batch,
  attend: Callable[..., Any],
  num_steps: int,
  num_calls: int,
  check: Callable[[jax.Array], float] | None,
) -> tuple[dict, jax.Array]:
  """Verifies and times a loop of an op, with given numbers; see `timed`."""
  outputs, error = [], {}

  def verify(state):
    outputs.append(state[1])
    if check is not None:
      error["relative_error"] = check(state[1])

  figures = device_loop.measure(
    loop_step(attend, batch, num_steps),
    loop_start(batch),
    num_steps,
    num_calls,
    verify,
    inputs=loop_inputs(batch),
  )
  return figures | error, outputs[0]


def loop_step(attend, batch: Batch, num_steps: int, *, grows: bool = False):
  """Returns the step of a loop whose last step uses the first table."""
  num_tables = len(batch.tables)

  def step(i, state, k_pages, v_pages, kv_lens, tables, *more):
    # A step does not begin before the output of the previous step is there.
    q, _ = lax.optimization_barrier(state)
    turn = lax.rem(num_steps - 1 - i, num_tables)
    table = lax.dynamic_index_in_dim(tables, turn, keepdims=False)
    lens = kv_lens + i if grows else kv_lens
    return q, attend(q, k_pages, v_pages, lens, table, *more)

  return step


def loop_start(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns the state before the first step: query and output."""
  return batch.q, jnp.zeros_like(batch.q)


def loop_inputs(batch: Batch) -> tuple:
  """Returns the arrays that every step reads besides its state."""
  pools = batch.k_pages, batch.v_pages
  return (*pools, batch.kv_lens, batch.tables, *batch.more)


def reference(attend: Callable[..., Any], batch: Batch) -> jax.Array:
  """Returns the output with the first table."""

  @jax.jit
  def run(q, k_pages, v_pages, kv_lens, tables, *more):
    return attend(q, k_pages, v_pages, kv_lens, tables[0], *more)

  return run(batch.q, *loop_inputs(batch))


def relative_error(
  expected: jax.Array, out: jax.Array, *, at_most: float = MAX_ERROR
) -> float:
  """Returns the largest relative error (2-norm) of any head's output.

  Raises:
    RuntimeError: If the error is not below `at_most`.
  """
  error = float(_largest_error(expected, out))
  if not error < at_most:  # true for NaN, too
    raise RuntimeError(f"the output is wrong: {error=:.3g}")
  return error


@jax.jit
def _largest_error(expected, out):
  expected, out = expected.astype(jnp.float32), out.astype(jnp.float32)
  length = functools.partial(jnp.linalg.norm, axis=-1)
  return jnp.max(length(out - expected) / length(expected))


def gb_per_s(sizes: Sizes, num_tokens: float, figures: dict) -> float:
  """Returns the GB/s at which keys and values are read, by the median."""
  return num_bytes(sizes, num_tokens) / figures["us"]["median"] / 1e3
