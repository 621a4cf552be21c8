"""Loops of attention: their time, and the error of what they return."""

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
GUESS = 4e6  # bytes read in a microsecond, to choose how often to call
CALL_COST = 10  # microseconds of a call at least, to the same end


def decode(
  sizes: Sizes, implementation: str | None = None, **options
) -> Callable[..., Any]:
  """Returns decode attention, by that of `sizes` if none is named."""
  return functools.partial(
    paged_jax.paged_attention,
    implementation=implementation or sizes.implementation,
    **options,
  )


def no_attention(q, k_pages, v_pages, kv_lens, page_indices):
  """Takes the place of attention: reads a page table, and no keys."""
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
    sizes: Of the benchmark.
    batch: What to attend.
    attend: From query, pools, lengths, a table and `batch.more` to the output.
    num_tokens: Keys that are seen, of all sequences.
    check: From the last output to its error; raises one if it is wrong.
    slow: Whether the loop is to have a fiftieth of the steps.

  Returns:
    The figures, and the output of the last step, of the first table.
  """
  guess = num_bytes(sizes, num_tokens) / GUESS + CALL_COST
  steps = max(1, round(sizes.loop_us / guess / (50 if slow else 1)))
  num_loops = sizes.slow_loops if slow else sizes.num_loops
  side, out = measured(batch, attend, steps, num_loops, check)
  side["gb_per_s"] = gb_per_s(sizes, num_tokens, side)
  return side, out


def measured(
  batch: Batch,
  attend: Callable[..., Any],
  num_steps: int,
  num_calls: int,
  check: Callable[[jax.Array], float] | None,
) -> tuple[dict, jax.Array]:
  """Verifies and times calls of a loop of an op; see `timed`."""
  outputs, error = [], {}

  def verify(state):
    outputs.append(state[1])
    if check is not None:
      error["relative_error"] = check(state[1])

  side = device_loop.measure(
    loop_step(attend, batch, num_steps),
    loop_start(batch),
    num_steps,
    num_calls,
    verify,
    inputs=loop_inputs(batch),
  )
  return side | error, outputs[0]


def loop_step(attend, batch: Batch, num_steps: int, *, grows: bool = False):
  """Returns a step of a loop; its last is of the first table."""
  num_tables = len(batch.tables)

  def step(i, state, k_pages, v_pages, kv_lens, tables, *more):
    # The output of the step before must be there before the next begins.
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
  """Returns what every step reads besides its state."""
  pools = batch.k_pages, batch.v_pages
  return (*pools, batch.kv_lens, batch.tables, *batch.more)


def reference(attend: Callable[..., Any], batch: Batch) -> jax.Array:
  """Returns the output of the first table."""

  @jax.jit
  def run(q, k_pages, v_pages, kv_lens, tables, *more):
    return attend(q, k_pages, v_pages, kv_lens, tables[0], *more)

  return run(batch.q, *loop_inputs(batch))


def relative_error(
  expected: jax.Array, out: jax.Array, *, at_most: float = MAX_ERROR
) -> float:
  """Returns the largest of any head's output, relative to its length.

  Raises:
    RuntimeError: If it is not below `at_most`.
  """
  error = float(_largest_error(expected, out))
  if not error < at_most:  # as if it is NaN
    raise RuntimeError(f"the output is wrong: {error=:.3g}")
  return error


@jax.jit
def _largest_error(expected, out):
  expected, out = expected.astype(jnp.float32), out.astype(jnp.float32)
  length = functools.partial(jnp.linalg.norm, axis=-1)
  return jnp.max(length(out - expected) / length(expected))


def gb_per_s(sizes: Sizes, num_tokens: float, side: dict) -> float:
  """Returns how fast keys and values are read, in the median time."""
  return num_bytes(sizes, num_tokens) / side["us"]["median"] / 1e3
