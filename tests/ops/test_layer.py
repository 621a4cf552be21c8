"""One layer of a model writes its tokens and attends as the oracle does."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from paged_jax import (
  CacheConfig,
  LayerKV,
  PagedCache,
  attend_layer,
  begin_padded,
  begin_step,
  paged_attention,
  ragged_paged_attention,
)

NUM_SEQS, NUM_Q = 4, 4
WIDE = LayerKV(2, 16)
LAYERS = (WIDE, LayerKV(2, 16, shares=0), LayerKV(1, 8, sliding_window=5))
# One dict for each layer; its window may be narrower than the declared one.
SINKS = np.array([-1, 0.5, 2, 0], np.float32)
SLOPES = np.array([0.5, 0.1, 1.5, 0.02], np.float32)
OPTIONS = (
  {},
  dict(scale=0.3, logits_soft_cap=1.5, sinks=SINKS),
  dict(sliding_window=4, num_sink_tokens=2, alibi_slopes=SLOPES),
)


def _cache(layers=(WIDE,), num_pages=8):
  """Returns an empty cache of NaN that hands out pages in a random order."""
  config = CacheConfig(
    num_pages=num_pages,
    page_size=8,
    num_seqs=NUM_SEQS,
    max_len=32,
    dtype=jnp.float32,
  )
  cache = PagedCache.init(layers, config)
  rng, tables = np.random.default_rng(6), []
  for i, group in enumerate(cache.groups):
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), group.pool)
    cache = cache.with_pool(i, nan)
    free = jnp.asarray(rng.permutation(group.table.num_pages), jnp.int32)
    tables.append(dataclasses.replace(group.table, free_pages=free))
  return cache.with_tables(tables)


class _Sequences:
  """K and V of each row so far, contiguous; rows grow by `add`."""

  def __init__(self, layer=WIDE, seed=0):
    self.rng = np.random.default_rng(seed)
    self.layer = layer
    empty = np.zeros((0, layer.num_kv_heads, layer.head_dim), np.float32)
    self.k, self.v = [empty] * NUM_SEQS, [empty] * NUM_SEQS

  def tokens(self, shape, is_token):
    """Returns q, k and v, which are NaN where there is no token."""
    heads = NUM_Q, self.layer.num_kv_heads, self.layer.num_kv_heads
    out = []
    for num_heads in heads:
      x = self.rng.standard_normal((*shape, num_heads, self.layer.head_dim))
      x[~is_token] = np.nan
      out.append(x.astype(np.float32))
    return out

  def add(self, row, k, v):
    self.k[row] = np.concatenate([self.k[row], k])
    self.v[row] = np.concatenate([self.v[row], v])

  def expected(self, row, q, tree=None, **options):
    """Returns the oracle's output for the last tokens of a row."""
    keys, values = self.k[row], self.v[row]
    context = len(keys) - len(q)
    scale = options.pop("scale", self.layer.head_dim**-0.5)
    window = options.pop("sliding_window", None)
    num_sinks = options.pop("num_sink_tokens", 0)
    out = np.zeros(q.shape)
    for i, query in enumerate(q):
      key, position = np.arange(len(keys)), context + i
      visible = key <= position
      if tree is not None:
        visible = (key < context) | np.isin(
          key - context, np.flatnonzero(tree[i])
        )
      if window is not None:
        visible &= (key > position - window) | (key < num_sinks)
      out[i], _ = oracle.attend_one(
        query,
        keys,
        values,
        visible,
        scale=scale,
        position=position,
        **options,
      )
    return out


def _assert_close(out, expected):
  assert cases.relative_error(out, expected) < cases.TOLERANCE["float32"]


# The flat step, with all kinds of layers.


@jax.jit
def _flat_step(cache, q_lens, tokens):
  cache, step = begin_step(cache, q_lens, tokens[0][0].shape[0])
  outs = []
  for layer, (q, k, v) in enumerate(tokens):
    out, cache = attend_layer(
      q, k, v, cache, step, layer, **cases.on_device(OPTIONS[layer])
    )
    outs.append(out)
  return outs, step.ok, cache


def test_layers_of_a_flat_step_match_oracle():
  """Crosses pages, follows a context, and has rows without tokens or pages.

  Two layers share keys, and the third has its own group.
  """
  num_tokens, cache = 24, _cache(LAYERS, num_pages=(12, 8))
  own = [_Sequences(WIDE), None, _Sequences(LAYERS[2], 1)]
  other = _Sequences(WIDE, 2)  # the queries of the second layer
  lens = np.zeros(NUM_SEQS, int)
  # The last step needs 10 of 8 pages: row 2 is refused; row 3 needs none.
  for q_lens in ([8, 7, 0, 1], [1, 9, 8, 5], [0, 1, 17, 2]):
    refused = lens + q_lens > 24
    row = np.repeat(np.arange(NUM_SEQS), q_lens)
    stored = np.zeros(num_tokens, bool)
    stored[: len(row)] = ~refused[row]
    first, last = (own[i].tokens((num_tokens,), stored) for i in (0, 2))
    queries, _, _ = other.tokens((num_tokens,), stored)
    outs, ok, cache = _flat_step(
      cache, np.asarray(q_lens, np.int32), [first, (queries, None, None), last]
    )
    assert ok.tolist() == ((np.asarray(q_lens) > 0) & ~refused).tolist()
    expected = [np.zeros(out.shape) for out in outs]
    ends = np.cumsum(q_lens)
    for r in np.flatnonzero(ok):
      span = slice(ends[r] - q_lens[r], ends[r])
      for i, (q, k, v) in ((0, first), (2, last)):
        own[i].add(r, k[span], v[span])
        expected[i][span] = own[i].expected(r, q[span], **OPTIONS[i])
      expected[1][span] = own[0].expected(r, queries[span], **OPTIONS[1])
    lens += np.where(ok, q_lens, 0)
    for out, right in zip(outs, expected, strict=True):
      _assert_close(out, right)
      assert not np.asarray(out)[~stored].any()
  assert lens.tolist() == [9, 17, 8, 8]


@jax.jit
def _padded_step(cache, mask, q, k, v):
  cache, step = begin_padded(cache, mask)
  out, cache = attend_layer(q, k, v, cache, step, 0)
  return out, cache


def test_a_padded_batch_matches_oracle_and_padding_leaves_no_trace():
  sequences, cache = _Sequences(), _cache()
  masks = [
    ["  xxxx", "xxx   ", "x x xx", "      "],
    ["xxxx  ", "    xx", " x xxx", "  x   "],
    ["x", "x", " ", "x"],  # a decode step, at pages' edges
    ["x", "x", "x", "x"],
  ]
  for rows in masks:
    mask = np.array([[c == "x" for c in row] for row in rows])
    q, k, v = sequences.tokens(mask.shape, mask)
    out, cache = _padded_step(cache, mask, q, k, v)
    assert out.shape == q.shape
    expected = np.zeros(q.shape)
    for row, here in enumerate(mask):
      sequences.add(row, k[row, here], v[row, here])
      expected[row, here] = sequences.expected(row, q[row, here])
    _assert_close(out, expected)
    assert not np.asarray(out)[~mask].any()
  assert cache.kv_lens.tolist() == [10, 7, 9, 3]


@jax.jit
def _tree_step(cache, q_lens, q, k, v, tree):
  cache, step = begin_step(
    cache, q_lens, q.shape[0], max_q_len=3, tree_mask=tree
  )
  out, cache = attend_layer(q, k, v, cache, step, 0)
  return out, step.ok, cache


def test_a_tree_mask_decides_what_new_tokens_see():
  sequences, cache = _Sequences(), _cache()
  rng, num_tokens = np.random.default_rng(3), 8
  # Four tokens are more than `max_q_len`: the row is refused.
  for q_lens in ([3, 2, 0, 3], [3, 3, 0, 2], [3, 1, 4, 0]):
    row = np.repeat(np.arange(NUM_SEQS), q_lens)
    stored = np.zeros(num_tokens, bool)
    stored[: len(row)] = np.asarray(q_lens)[row] <= 3
    tree = rng.random((num_tokens, 3)) < 0.6
    q, k, v = sequences.tokens((num_tokens,), stored)
    out, ok, cache = _tree_step(
      cache, np.asarray(q_lens, np.int32), q, k, v, tree
    )
    expected, ends = np.zeros(q.shape), np.cumsum(q_lens)
    for r in np.flatnonzero(ok):
      span = slice(ends[r] - q_lens[r], ends[r])
      sequences.add(r, k[span], v[span])
      expected[span] = sequences.expected(r, q[span], tree[span])
    _assert_close(out, expected)
    assert not np.asarray(out)[~stored].any()
  assert cache.kv_lens.tolist() == [9, 6, 0, 5]


# Without a cache.

PLAIN = functools.partial(attend_layer, cache=None, step=None, layer=0)
WHOLE_OPTIONS = {
  "plain": {},
  "window, sink tokens, sinks": dict(
    sliding_window=3, num_sink_tokens=1, sinks=SINKS, scale=0.3
  ),
  "slopes, soft cap": dict(alibi_slopes=SLOPES, logits_soft_cap=1.5),
}


def _whole(batch=2, length=9):
  """Returns q, k and v of whole sequences."""
  rng = np.random.default_rng(4)
  normal = lambda heads: rng.standard_normal((batch, length, heads, 16))
  return [normal(heads).astype(np.float32) for heads in (NUM_Q, 2, 2)]


def _expected_whole(q, k, v, **options):
  out = []
  for one_q, one_k, one_v in zip(q, k, v, strict=True):
    sequences = _Sequences()
    sequences.k[0], sequences.v[0] = one_k, one_v
    out.append(sequences.expected(0, one_q, **options))
  return np.stack(out)


@pytest.mark.parametrize("options", WHOLE_OPTIONS.values(), ids=WHOLE_OPTIONS)
def test_without_a_cache_whole_sequences_match_oracle(options):
  q, k, v = _whole()
  attend = jax.jit(lambda q, k, v: PLAIN(q, k, v, **cases.on_device(options)))
  out, cache = attend(q, k, v)
  assert cache is None
  _assert_close(out, _expected_whole(q, k, v, **options))
  # A sequence without a batch is the same.
  out, _ = attend(q[0], k[0], v[0])
  _assert_close(out, _expected_whole(q[:1], k[:1], v[:1], **options)[0])


def test_ops_on_pages_refuse_gradients_by_name():
  q = jnp.ones((2, 4, 16))
  pages = jnp.ones((3, 2, 8, 16))
  lens, entries = jnp.array([5, 9]), jnp.array([[0, 3], [1, 2]])
  offsets = jnp.array([0, 1, 2])
  ops = {
    "paged_attention": lambda q, k, v: paged_attention(q, k, v, lens, entries),
    "ragged_paged_attention": lambda q, k, v: ragged_paged_attention(
      q, k, v, lens, entries, offsets, 2
    ),
  }
  for name, op in ops.items():
    for argument in range(3):
      grad = jax.grad(lambda *x, op=op: op(*x).sum(), argument)
      for run in (grad, jax.jit(grad)):
        with pytest.raises(NotImplementedError, match=f"^{name} has no gradie"):
          run(q, pages, pages)
    assert jnp.isfinite(op(q, pages, pages)).all()


def test_without_a_cache_there_are_gradients():
  static = dict(sliding_window=3, num_sink_tokens=1, logits_soft_cap=2.0)
  arrays = dict(zip("qkv", _whole(1, 4), strict=True))
  arrays |= dict(sinks=SINKS, alibi_slopes=SLOPES)
  rng = np.random.default_rng(5)
  weights = rng.standard_normal(arrays["q"].shape).astype(np.float32)

  def loss(arrays):
    return jnp.sum(PLAIN(**arrays, **static)[0] * weights)

  def expected_loss(arrays):
    return np.sum(_expected_whole(**arrays, **static) * weights)

  grads = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, arrays))
  for name, value in arrays.items():
    grad = np.asarray(grads[name], np.float64)
    assert np.isfinite(grad).all()
    for _ in range(3):
      along = rng.standard_normal(value.shape)
      at = lambda t, name=name, along=along: expected_loss(
        arrays | {name: arrays[name].astype(np.float64) + t * along}
      )
      difference = (at(1e-5) - at(-1e-5)) / 2e-5
      np.testing.assert_allclose(
        np.sum(grad * along), difference, rtol=1e-4, atol=1e-5
      )
