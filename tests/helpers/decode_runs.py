"""Runs the decode kernel, for several test files."""

import dataclasses

import cases
import jax.numpy as jnp
import kernel_calls
import numpy as np
import oracle

from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.decode.config import Config

# The default has a program for each multiprocessor, for which the interpreter
# needs minutes.
SMALL = Config(64, 2, 3)
# Most of the time goes into compiling the interpreter: tests share programs.
SHARED = dict(config=SMALL, sinks=(-2, 0, 1))


def make(kv_lens, *, dtype="bfloat16", **options):
  """Returns a Problem of four query heads and one KV head."""
  options = dict(num_q_heads=4, num_kv_heads=1) | options
  return cases.make(kv_lens=kv_lens, dtype=dtype, **options)


def _pad_with_nan_pages(problem):
  """Adds NaN pages at both ends, which a page index out of range may hit."""
  last = len(problem.k_pages)
  pad = lambda pages: np.pad(
    pages, ((1, 1), (0, 0), (0, 0), (0, 0)), constant_values=np.nan
  )
  return dataclasses.replace(
    problem,
    k_pages=pad(problem.k_pages),
    v_pages=pad(problem.v_pages),
    page_indices=np.where(
      problem.page_indices < last, problem.page_indices + 1, last + 2
    ).astype(np.int32),
  )


def make_shared(*kv_lens):
  """Returns a Problem whose shapes do not depend on the lengths."""
  problem = _pad_with_nan_pages(make([400, 400, 400], num_q_heads=3))
  problem.kv_lens[:] = kv_lens
  return problem


def run(
  problem,
  *,
  config=SMALL,
  sinks=None,
  alibi_slopes=None,
  interpret=cases.INTERPRET,
  **options,
):
  """Returns output and LSE of the kernel."""
  per_head = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
  out, lse = kernel_calls.call(
    decode_kernel.paged_decode,
    *problem.decode_args(),
    sinks=per_head(sinks),
    alibi_slopes=per_head(alibi_slopes),
    config=config,
    interpret=interpret,
    **cases.PLAIN | options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  return np.asarray(out), np.asarray(lse)


def check(problem, *, config=SMALL, sinks=None, scales=None, **options):
  """Compares the kernel with the oracle."""
  scales, judged = scales or {}, cases.PLAIN | options
  judged.pop("batch_invariant", None)  # the oracle has no such option
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], sinks=sinks, **judged, **scales
  )
  scales = {name: jnp.asarray(x) for name, x in scales.items()}
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = run(problem, config=each, sinks=sinks, **options, **scales)
    cases.assert_matches(out, lse, *expected, problem.q.dtype)
