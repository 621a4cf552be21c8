"""Runs the ragged kernel, for several test files."""

import dataclasses

import cases
import jax.numpy as jnp
import kernel_calls
import numpy as np
import oracle

from pallas_kernels.ragged import kernel as ragged_kernel
from pallas_kernels.ragged.config import Config

# The default has a program for each multiprocessor, for which the interpreter
# needs minutes.
SMALL = Config(64, 2, num_programs=3, num_q_stages=2)
SPLIT = dataclasses.replace(SMALL, splits=True)
Q_LENS = [0, 1, 7, 63, 64, 65, 3]
KV_LENS = [20, 1, 70, 200, 64, 130, 0]


def run(
  problem,
  scales=None,
  *,
  config=SMALL,
  sinks=None,
  tree_mask=None,
  interpret=cases.INTERPRET,
  **options,
):
  """Returns output and LSE of the kernel."""
  scales = {name: jnp.asarray(x) for name, x in (scales or {}).items()}
  options = cases.on_device(options)
  out, lse = kernel_calls.call(
    ragged_kernel.attend,
    *problem.args(),
    sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    tree_mask=None if tree_mask is None else jnp.asarray(tree_mask),
    config=config,
    interpret=interpret,
    **cases.PLAIN | options,
    **scales,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  return np.asarray(out), np.asarray(lse)


def check(problem, *, config=SMALL, sinks=None, **options):
  """Compares the kernel with the oracle."""
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), sinks=sinks, **cases.PLAIN | options
  )
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = run(problem, config=each, sinks=sinks, **options)
    cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


def make(**options):
  """Returns a Problem of many lengths."""
  options = (
    dict(kv_lens=KV_LENS, q_lens=Q_LENS, dtype="bfloat16", spare_tokens=5)
    | options
  )
  return cases.make(**options)
