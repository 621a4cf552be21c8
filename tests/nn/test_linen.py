"""Flax Linen modules need only the cache and `attend_layer`."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import linen

from paged_jax import CacheConfig, LayerKV, PagedCache, attend_layer, begin_step
from paged_jax.nn import apply_rotary

HIDDEN, NUM_Q, NUM_KV, HEAD_DIM, THETA = 24, 4, 2, 16, 50.0


class LinenAttention(linen.Module):
  """Projects, rotates and attends, as written by a user of Linen."""

  layer: int

  @linen.compact
  def __call__(self, x, cache, step):
    heads = lambda name, num_heads: linen.DenseGeneral(
      (num_heads, HEAD_DIM), use_bias=False, name=name
    )(x)
    q, k, v = heads("q", NUM_Q), heads("k", NUM_KV), heads("v", NUM_KV)
    if step is None:
      positions = jnp.arange(x.shape[-2], dtype=jnp.int32)
    else:
      positions = step.positions
    q = apply_rotary(q, positions, THETA)
    k = apply_rotary(k, positions, THETA)
    out, cache = attend_layer(q, k, v, cache, step, self.layer)
    project = linen.DenseGeneral(
      HIDDEN, axis=(-2, -1), use_bias=False, name="o"
    )
    return project(out), cache


def _expected(variables, x):
  """Returns the layer's output for a whole sequence, in float64."""
  kernels = {
    name: np.asarray(each["kernel"], np.float64)
    for name, each in variables["params"].items()
  }
  heads = lambda name: np.einsum("th,hnd->tnd", np.float64(x), kernels[name])
  positions = np.arange(len(x))
  q, k = (oracle.rotate(heads(name), positions, THETA) for name in "qk")
  out = [
    oracle.attend_one(
      q[i], k, heads("v"), positions <= i, scale=HEAD_DIM**-0.5
    )[0]
    for i in positions
  ]
  return np.einsum("tnd,ndh->th", np.stack(out), kernels["o"])


def test_a_linen_layer_matches_oracle_with_and_without_a_cache():
  module = LinenAttention(layer=1)
  rng = np.random.default_rng(0)
  sequences = [
    rng.standard_normal((length, HIDDEN)).astype(np.float32)
    for length in (10, 18)
  ]
  apply = jax.jit(module.apply)
  variables = jax.jit(module.init)(jax.random.key(0), sequences[0], None, None)
  expected = [_expected(variables, x) for x in sequences]
  tolerance = 2 * cases.TOLERANCE["float32"]  # two matrix products besides

  # 1. Without a cache: training.
  out, cache = apply(variables, sequences[0], None, None)
  assert cache is None
  assert cases.relative_error(out, expected[0]) < tolerance

  # 2. All tokens of each sequence except the last two, as one flat step.
  config = CacheConfig(
    num_pages=6, page_size=8, num_seqs=2, max_len=24, dtype=jnp.float32
  )
  cache = PagedCache.init([LayerKV(NUM_KV, HEAD_DIM)] * 2, config)
  begin = jax.jit(begin_step, static_argnames=("num_tokens", "max_q_len"))
  lens = [len(x) - 2 for x in sequences]
  cache, step = begin(cache, np.array(lens, np.int32), sum(lens))
  flat = np.concatenate([x[:-2] for x in sequences])
  out, cache = apply(variables, flat, cache, step)
  right = np.concatenate([x[:-2] for x in expected])
  assert cases.relative_error(out, right) < tolerance

  # 3. The last two tokens, one per step, across the end of a page.
  for i in (-2, -1):
    cache, step = begin(cache, np.ones(2, np.int32), 2, max_q_len=1)
    tokens = np.stack([x[i] for x in sequences])
    out, cache = apply(variables, tokens, cache, step)
    right = np.stack([x[i] for x in expected])
    assert cases.relative_error(out, right) < tolerance
