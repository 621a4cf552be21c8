"""Problems whose rows share pages, and runs of cascade attention on them."""

import dataclasses

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax

PAGE = 16
# Each row's own tokens after the prefix: none, one, up to the end of a page,
# past it, many.
OWN_LENS = [0, 1, 15, 16, 17, 70]
RUNS = [
  pytest.param("xla", "float32", id="xla-float32"),
  pytest.param("xla", "bfloat16", id="xla-bfloat16"),
  pytest.param("xla", "float16", id="xla-float16"),
  pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.gpu, id="mosaic-bf"),
  pytest.param("mosaic_gpu", "float16", marks=pytest.mark.gpu, id="mosaic-f16"),
]
SINKS = np.array([-1, 0, 2, 30], np.float32)
FEW_RUNS = RUNS[:1] + RUNS[3:4]


def make(num_shared=5, own_lens=OWN_LENS, poison=np.nan, **options):
  """Returns a Problem whose rows share their first pages."""
  kv_lens = [num_shared * PAGE + n for n in own_lens]
  problem = cases.make(
    kv_lens=kv_lens, page_size=PAGE, poison=poison, **options
  )
  return share(problem, {0: range(len(kv_lens))}, num_shared, poison)


def share(problem, rows_of, num_shared, poison=np.nan):
  """Makes rows begin with the pages of others; poisons pages that get free."""
  table = problem.page_indices.copy()
  for leader, rows in rows_of.items():
    for row in rows:
      table[row, :num_shared] = table[leader, :num_shared]
  free = np.setdiff1d(np.arange(len(problem.k_pages)), table)
  pools = {}
  for name in ("k_pages", "v_pages"):
    pools[name] = getattr(problem, name).copy()
    pools[name][free] = poison
  return dataclasses.replace(problem, page_indices=table, **pools)


def _jax(options):
  is_array = lambda x: isinstance(x, np.ndarray)
  return {n: jnp.asarray(x) if is_array(x) else x for n, x in options.items()}


def run(problem, num_shared, **options):
  """Returns output and LSE of cascade attention."""
  return paged_jax.cascade_attention(
    *problem.decode_args(), num_shared, return_lse=True, **_jax(options)
  )


def expected(problem, **options):
  """Returns the oracle's output and LSE over the same table."""
  arrays = dataclasses.astuple(problem)[:5]
  return oracle.paged_attention(*arrays, **options)


def check(problem, num_shared, *, groups=None, implementation=None, **options):
  """Asserts that cascade attention matches `expected`."""
  if groups is not None:
    groups = np.asarray(groups, np.int32)
  out, lse = run(
    problem,
    num_shared,
    cu_group_lens=groups,
    implementation=implementation,
    **options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  judged = expected(problem, **options)
  cases.assert_matches(out, lse, *judged, problem.q.dtype)
