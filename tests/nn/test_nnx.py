import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.experimental import checkify

from paged_jax import CacheConfig, LayerKV, PagedCache, begin_step
from paged_jax.nn import PagedAttention, apply_rotary

HIDDEN, NUM_Q, NUM_KV, HEAD_DIM = 24, 4, 2, 16
SLOPES = (0.5, 0.1, 1.5, 0.02)


def _module(layer=0, **options):
  return PagedAttention(
    HIDDEN,
    NUM_Q,
    NUM_KV,
    HEAD_DIM,
    layer=layer,
    rngs=nnx.Rngs(0),
    **dict(rope_theta=50.0) | options,
  )


def _cache(num_seqs=2, num_pages=12, dtype=jnp.float32, **options):
  config = CacheConfig(
    num_pages=num_pages,
    page_size=8,
    num_seqs=num_seqs,
    max_len=40,
    dtype=dtype,
    **options,
  )
  return PagedCache.init([LayerKV(NUM_KV, HEAD_DIM)] * 2, config)


def _begin_decode(cache, *rows):
  """Begins a step with one token per row, or per row that is True."""
  tokens = jnp.asarray(rows or [True] * cache.num_seqs, jnp.int32)
  return begin_step(cache, tokens, cache.num_seqs, max_q_len=1)


def _pool(cache):
  return cache.groups[0].pool


def _table(cache):
  return cache.groups[0].table


def _tokens(n, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((n, HIDDEN)), jnp.float32)


def _causal(positions, i):
  return positions <= i


def _expected(
  module,
  x,
  visible=_causal,
  scale=HEAD_DIM**-0.5,
  stored=lambda rows: rows,
  rotated=True,
  **options,
):
  """Returns the module's output for a whole sequence, in float64.

  `stored` are K and V as they are read from the cache.
  """
  qkv = np.asarray(x, np.float64) @ np.asarray(module.qkv_proj.kernel[...])
  # For each KV head: its query heads, key and value.
  by_head = qkv.reshape(len(x), NUM_KV, -1, HEAD_DIM)
  q = by_head[:, :, :-2].reshape(len(x), NUM_Q, HEAD_DIM)
  k, v = by_head[:, :, -2], by_head[:, :, -1]
  positions = np.arange(len(x))
  if rotated:
    q, k = (oracle.rotate(part, positions, 50.0) for part in (q, k))
  k, v = stored(k), stored(v)
  out = [
    oracle.attend_one(
      q[i],
      k,
      v,
      visible(positions, i),
      scale=scale,
      position=i,
      **options,
    )[0]
    for i in positions
  ]
  out = np.stack(out).reshape(len(x), -1)
  return out @ np.asarray(module.o_proj.kernel[...], np.float64)


def _prefill(module, cache, sequences):
  lens = jnp.array([len(x) for x in sequences], jnp.int32)
  flat = jnp.concatenate(sequences)
  cache, step = begin_step(cache, lens, len(flat))
  out, cache = module(flat, cache, step)
  return np.split(np.asarray(out), np.cumsum(lens)[:-1]), cache


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_a_ragged_batch_gives_each_sequence_its_own_attention(layer):
  module, sequences = _module(layer), [_tokens(11), _tokens(17, 1)]
  outs, _ = _prefill(module, _cache(), sequences)
  for x, out in zip(sequences, outs, strict=True):
    np.testing.assert_allclose(out, _expected(module, x), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_decoding_token_by_token_is_prefilling_at_once():
  module, sequences = _module(), [_tokens(11), _tokens(17, 1)]
  expected = [_expected(module, x) for x in sequences]
  _, cache = _prefill(module, _cache(), [x[:7] for x in sequences])
  decode = jax.jit(lambda module, x, cache, step: module(x, cache, step))
  for i in range(7, 11):
    cache, step = _begin_decode(cache)
    out, cache = decode(
      module, jnp.stack([x[i] for x in sequences]), cache, step
    )
    for row in range(2):
      np.testing.assert_allclose(
        np.asarray(out[row]), expected[row][i], rtol=0, atol=2e-5
      )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (dict(logits_soft_cap=0.5), dict(logits_soft_cap=0.5)),
    (dict(scale=0.7), dict(scale=0.7)),
    (dict(sliding_window=1), dict(visible=lambda key, i: key == i)),
    (
      dict(sliding_window=2, num_sink_tokens=1),
      dict(visible=lambda key, i: (key <= i) & ((key > i - 2) | (key < 1))),
    ),
    (dict(alibi_slopes=SLOPES), dict(alibi_slopes=SLOPES)),
    (dict(rope_theta=None), dict(rotated=False)),
  ],
)
def test_options_reach_the_op(options, expected):
  module, x = _module(**options), _tokens(9)
  outs, cache = _prefill(module, _cache(1), [x[:8]])
  cache, step = _begin_decode(cache)
  last, _ = module(x[8:], cache, step)
  got = np.concatenate([outs[0], np.asarray(last)])
  np.testing.assert_allclose(
    got, _expected(module, x, **expected), rtol=0, atol=2e-5
  )
  assert np.abs(_expected(module, x) - got).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_only_k_and_v_are_rounded_to_a_quantised_cache(dtype):
  def stored(rows):
    data, scales = cases.quantise_rows(rows, dtype)
    return data.astype(np.float64) * scales[..., None]

  module, x = _module(), _tokens(12)
  cache = _cache(1, dtype=jnp.dtype(dtype))
  outs, cache = _prefill(module, cache, [x[:11]])
  cache, step = _begin_decode(cache)
  last, _ = module(x[11:], cache, step)
  got = np.concatenate([outs[0], np.asarray(last)])
  expected = _expected(module, x, stored=stored)
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
  assert np.abs(_expected(module, x) - got).max() > 1e-3


@pytest.mark.slow
def test_the_cache_is_returned_and_not_mutated():
  module, cache = _module(), _cache()
  before = np.array(_pool(cache).k)
  _, after = _prefill(module, cache, [_tokens(3), _tokens(3, 1)])
  np.testing.assert_array_equal(np.asarray(_pool(cache).k), before)
  assert np.asarray(_pool(after).k).any()


def test_a_refused_row_writes_nothing_and_attends_to_nothing():
  module = _module()
  cache = _cache(num_pages=2)
  outs, after = _prefill(module, cache, [_tokens(11), _tokens(9, 1)])
  assert after.kv_lens.tolist() == [11, 0]
  assert not outs[1].any()
  expected = _expected(module, _tokens(11))
  np.testing.assert_allclose(outs[0], expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_decode_step_leaves_other_rows_alone():
  module = _module()
  _, cache = _prefill(module, _cache(), [_tokens(8), _tokens(8, 1)])
  after, step = _begin_decode(cache, False, True)
  assert step.ok.tolist() == [False, True]
  assert after.kv_lens.tolist() == [8, 9]
  out, after = module(_tokens(2, 2), after, step)
  assert not np.asarray(out[0]).any()
  page = int(_table(cache).page_indices[0, 0])
  np.testing.assert_array_equal(
    np.asarray(_pool(after).k[page]), np.asarray(_pool(cache).k[page])
  )


def test_padding_tokens_of_a_step_have_no_slot():
  cache, step = begin_step(_cache(), jnp.array([3, 0], jnp.int32), 6)
  nowhere = _pool(cache).num_pages * _pool(cache).page_size
  assert (np.asarray(step.groups[0].slots[:3]) < nowhere).all()
  assert (np.asarray(step.groups[0].slots[3:]) == nowhere).all()
  assert step.ok.tolist() == [True, False]
  assert step.positions.tolist() == [0, 1, 2, 0, 0, 0]


@pytest.mark.slow
def test_debug_finds_tokens_that_have_one_slot():
  cache, step = begin_step(_cache(), jnp.array([3, 0]), 3)
  cache = cache.with_tables([dataclasses.replace(_table(cache), debug=True)])
  run = jax.jit(
    checkify.checkify(lambda step: _module()(_tokens(3), cache, step))
  )
  assert run(step)[0].get() is None
  (group,) = step.groups
  group = dataclasses.replace(
    group, slots=group.slots.at[2].set(group.slots[0])
  )
  twice = dataclasses.replace(step, groups=(group,))
  assert "to more than one token" in run(twice)[0].get()


def test_rotary_turns_pairs_by_their_position():
  x = np.random.default_rng(0).standard_normal((5, 3, 16)).astype(np.float32)
  positions = np.array([0, 1, 7, 100, 5000], np.int32)
  rotated = apply_rotary(jnp.asarray(x), jnp.asarray(positions), 1e4)
  expected = oracle.rotate(np.float64(x), positions, 1e4)
  # In float32 the angle itself, up to 5000, has an error of a few 1e-4.
  np.testing.assert_allclose(np.asarray(rotated), expected, rtol=0, atol=2e-3)
  np.testing.assert_allclose(
    np.asarray(rotated[:4]), expected[:4], rtol=0, atol=5e-5
  )


@pytest.mark.slow
def test_half_precision_pools_take_any_model():
  module, cache = _module(), _cache()
  pool = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _pool(cache))
  cache = cache.with_pool(0, pool)
  outs, after = _prefill(module, cache, [_tokens(11), _tokens(4, 1)])
  assert _pool(after).k.dtype == jnp.bfloat16
  assert outs[0].dtype == np.float32
  expected = _expected(module, _tokens(11))
  np.testing.assert_allclose(outs[0], expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [((24, 4, 3, 16), "num_q_heads=4"), ((24, 4, 2, 15), "head_dim=15")],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
  with pytest.raises(ValueError, match=message):
    PagedAttention(*sizes, layer=0, rngs=nnx.Rngs(0))


def test_there_is_a_slope_for_each_head():
  with pytest.raises(ValueError, match=r"alibi_slopes=.* num_q_heads=4"):
    _module(alibi_slopes=[0.5])


@pytest.mark.usefixtures("unchecked_shapes")
def test_batch_invariance_reaches_the_op():
  module = _module(batch_invariant="no")
  with pytest.raises(ValueError, match="batch_invariant='no'"):
    _prefill(module, _cache(1), [_tokens(3)])
  cache, step = _begin_decode(_cache(1))
  with pytest.raises(ValueError, match="batch_invariant='no'"):
    module(_tokens(1), cache, step)


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="implementation='cuda'"):
    _cache(implementation="cuda")
