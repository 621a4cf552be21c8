"""The package imports, and decodes, where Pallas Mosaic GPU does not exist."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = (
  "jax.experimental.pallas",
  "jax.experimental.pallas.mosaic_gpu",
  "jax.experimental.mosaic",
)
BLOCK = f"""
import sys
for name in {BLOCKED}:
  sys.modules[name] = None
"""

# Two rows: 9 tokens and 1 token, then one more of each.
DECODE = """
import jax.numpy as jnp
import numpy as np
import oracle
from paged_jax import (
  CacheConfig, LayerKV, PagedCache, attend_layer, begin_step, paged_attention
)

rng = np.random.default_rng(0)
draw = lambda n, heads: rng.standard_normal((n, heads, 16)).astype(np.float32)
rows = ([0] * 9 + [1], [0, 1])
steps = [(draw(len(r), 4), draw(len(r), 2), draw(len(r), 2)) for r in rows]
config = CacheConfig(
  num_pages=8, page_size=8, num_seqs=2, max_len=32, dtype=jnp.float32
)
cache = PagedCache.init([LayerKV(2, 16)], config)
for (q, k, v), lens, most in zip(steps, ([9, 1], [1, 1]), (None, 1)):
  cache, step = begin_step(cache, jnp.array(lens), len(q), max_q_len=most)
  layer_out, cache = attend_layer(q, k, v, cache, step, 0)
table, pool = cache.groups[0].table, cache.groups[0].pool
op_out = paged_attention(
  jnp.asarray(q), pool.k[:, 0], pool.v[:, 0], table.kv_lens, table.page_indices
)
k, v = (np.concatenate([step[i] for step in steps]) for i in (1, 2))
for row in range(2):
  own = np.concatenate(rows) == row
  expected, _ = oracle.attend_one(
    q[row], k[own], v[own], np.ones(own.sum(), bool), scale=0.25
  )
  for out in (layer_out, op_out):
    np.testing.assert_allclose(out[row], expected, atol=2e-6)
"""

GENERATE = """
import tiny_llama
from paged_jax import CacheConfig, generate
from paged_jax.generation import SamplingParams

completions = generate(
  tiny_llama.model(),
  tiny_llama.prompts([5, 9]),
  SamplingParams(max_new_tokens=3),
  cache=CacheConfig(num_pages=8, max_len=32),
)
assert [len(c.token_ids) for c in completions] == [3, 3]
"""

EVERY_MODULE = """
import importlib, pkgutil
import paged_jax
for module in pkgutil.walk_packages(paged_jax.__path__, "paged_jax."):
  importlib.import_module(module.name)
"""

INFO = """
from paged_jax.cli import main
assert main(["info"]) == 0
"""


def _run(code):
  """Runs code in a new process on the CPU and returns its stdout."""
  path = [ROOT, ROOT / "tests", ROOT / "tests" / "helpers"]
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(map(str, path)),
    },
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  "code",
  [
    pytest.param(DECODE, id="ops and cache"),
    pytest.param(GENERATE, id="generate"),
    pytest.param(EVERY_MODULE, id="every module"),
    pytest.param(INFO, id="paged-jax info"),
  ],
)
def test_it_runs_where_pallas_cannot_be_imported(code):
  _run(BLOCK + code)


def test_importing_the_package_imports_neither_kernels_nor_flax():
  loaded = _run("import sys, paged_jax; print(*sys.modules)").split()
  assert "paged_jax.ops.attention" in loaded
  assert not {*BLOCKED, "flax"} & set(loaded)
