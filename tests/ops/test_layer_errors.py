"""Errors of `attend_layer`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from paged_jax import (
  CacheConfig,
  LayerKV,
  PagedCache,
  attend_layer,
  begin_padded,
  begin_step,
)

NUM_SEQS = 4
LAYERS = (
  LayerKV(2, 16),
  LayerKV(2, 16, shares=0),
  LayerKV(1, 8, sliding_window=5),
)
CONFIG = CacheConfig(
  num_pages=8,
  page_size=8,
  num_seqs=NUM_SEQS,
  max_len=32,
  dtype=jnp.float32,
)


@functools.cache
def _abstract(kind="flat"):
  """Returns the abstract shapes of a cache and a step."""
  begin = {
    "flat": lambda cache, n: begin_step(cache, n, 6),
    "padded": lambda cache, n: begin_padded(cache, jnp.ones((4, 3), bool)),
    "tree": lambda cache, n: begin_step(
      cache, n, 6, max_q_len=3, tree_mask=jnp.ones((6, 3), bool)
    ),
  }[kind]
  q_lens = jax.ShapeDtypeStruct((NUM_SEQS,), jnp.int32)
  cache = jax.eval_shape(lambda: PagedCache.init(LAYERS, CONFIG))
  return jax.eval_shape(begin, cache, q_lens)


def _f32(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


GOOD = dict(q=_f32(6, 4, 16), k=_f32(6, 2, 16), v=_f32(6, 2, 16), layer=0)
PADDED = dict(q=_f32(4, 3, 4, 16), k=_f32(4, 3, 2, 16), v=_f32(4, 3, 2, 16))
WINDOWED = dict(q=_f32(6, 4, 8), k=_f32(6, 1, 8), v=_f32(6, 1, 8), layer=2)
SHARING = dict(k=None, v=None, layer=1)


def _attend(kind="flat", with_cache=True, with_step=True, **changes):
  arguments = GOOD | changes
  arrays = ("q", "k", "v", "sinks", "alibi_slopes")
  arrays = {name: arguments.pop(name, None) for name in arrays}
  cache, step = _abstract(kind)
  run = lambda arrays, cache, step: attend_layer(
    **arrays, cache=cache, step=step, **arguments
  )[0]
  cache, step = cache if with_cache else None, step if with_step else None
  return jax.eval_shape(run, arrays, cache, step)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    # The layer.
    (dict(layer=3), r"layer=3 must be in \[0, 3\)"),
    (dict(layer=-1), "layer=-1 must be in"),
    (dict(layer=1.0), "layer=1.0 must be a Python integer"),
    (WINDOWED, "sliding_window=None of layer 2 must be at most 5"),
    (WINDOWED | dict(sliding_window=6), "sliding_window=6 of layer 2"),
    (dict(layer=1), "k and v of layer 1 must be None: it shares"),
    (dict(k=None, v=None), "k and v of layer 0 must be arrays"),
    (dict(v=None), "k and v of layer 0 must be arrays"),
    (dict(k=None), "k and v of layer 0 must be arrays"),
    # Heads and widths.
    (dict(q=_f32(6, 3, 16)), r"q.shape=\(6, 3, 16\) .* num_kv_heads=2 query"),
    (dict(q=_f32(6, 4, 8)), r"q.shape=\(6, 4, 8\) .* head_dim=16 of layer 0"),
    (dict(k=_f32(6, 1, 16)), r"k.shape=\(6, 1, 16\) .* num_kv_heads=2 of lay"),
    (dict(v=_f32(6, 4, 16)), r"v.shape=\(6, 4, 16\) .* num_kv_heads=2 of lay"),
    (dict(k=_f32(6, 2, 8)), r"k.shape=\(6, 2, 8\) .* head_dim=16 of layer 0"),
    (SHARING | dict(q=_f32(6, 3, 16)), "q.shape=.* num_kv_heads=2 query"),
    (dict(q=_f32(6, 0, 16)), r"q.shape=\(6, 0, 16\) must be"),
    (dict(q=_f32(6, 4, 0)), r"q.shape=\(6, 4, 0\) must be"),
    (dict(q=_f32(6)), r"q.shape=\(6,\) must be"),
    # Tokens.
    (dict(q=_f32(5, 4, 16)), r"q.shape=\(5, 4, 16\) .* axes \(6,\) of the tok"),
    (dict(k=_f32(7, 2, 16)), r"k.shape=\(7, 2, 16\)"),
    (dict(v=_f32(6, 32)), r"v.shape=\(6, 32\)"),
    (dict(q=_f32(2, 3, 4, 16)), r"q.shape=\(2, 3, 4, 16\)"),
    (dict(kind="padded"), r"q.shape=\(6, 4, 16\) .* axes \(4, 3\) of the tok"),
    (PADDED | dict(kind="padded", k=_f32(12, 2, 16)), "k.shape=.*12"),
    # Dtypes.
    (dict(q=_f32(6, 4, 16, dtype=jnp.int32)), "q.dtype=int32 must be"),
    (dict(k=_f32(6, 2, 16, dtype=jnp.int8)), "k.dtype=int8 must be"),
    (dict(v=_f32(6, 2, 16, dtype=jnp.float8_e4m3fn)), "v.dtype=float8"),
    # Options.
    (dict(sinks=_f32(2)), r"sinks.shape=\(2,\)"),
    (dict(kind="tree", alibi_slopes=_f32(4)), "alibi_slopes must be None"),
    (dict(sliding_window=0), "sliding_window=0"),
    # A cache without a step, and a step without a cache.
    (dict(with_cache=False), "cache and step must both be given, or both be N"),
    (dict(with_step=False), "cache and step must both be given, or both be N"),
  ],
)
def test_what_does_not_fit_the_layer_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _attend(**changes)


@pytest.mark.parametrize(
  "changes", [dict(num_seqs=2), dict(max_len=64), dict(num_seqs=5)]
)
def test_a_step_of_another_cache_is_named(changes):
  config = dataclasses.replace(CONFIG, **changes)
  other = jax.eval_shape(lambda: PagedCache.init(LAYERS, config))
  q_lens = jax.ShapeDtypeStruct((config.num_seqs,), jnp.int32)
  begin = lambda cache, n: begin_step(cache, n, 6)[1]
  step = jax.eval_shape(begin, other, q_lens)
  run = lambda x, step: attend_layer(**x, cache=cache, step=step, layer=0)[0]
  cache, _ = _abstract()
  x = {name: GOOD[name] for name in ("q", "k", "v")}
  # A step may have fewer rows than the cache.
  if changes == dict(num_seqs=2):
    assert jax.eval_shape(run, x, step).shape == (6, 4, 16)
    return
  with pytest.raises(ValueError, match="step is of another cache"):
    jax.eval_shape(run, x, step)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_in_place_of_the_step_is_named():
  cache, step = _abstract()
  with pytest.raises(ValueError, match="got Step and PagedCache"):
    attend_layer(jnp.ones((6, 4, 16)), None, None, step, cache, 0)


def test_what_fits_is_taken():
  assert _attend().shape == (6, 4, 16)
  assert _attend(**PADDED, kind="padded").shape == (4, 3, 4, 16)
  assert _attend(**SHARING).shape == (6, 4, 16)
  assert _attend(**WINDOWED, sliding_window=5).shape == (6, 4, 8)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(k=None), "k and v must be arrays without a cache"),
    (dict(v=None), "k and v must be arrays without a cache"),
    (dict(q=_f32(6, 3, 16)), r"q.shape=\(6, 3, 16\) .* num_kv_heads=2"),
    (dict(k=_f32(6, 2, 8)), r"k.shape=\(6, 2, 8\) .* head_dim=16"),
    (dict(v=_f32(6, 1, 16)), r"v.shape=\(6, 1, 16\) .* num_kv_heads=2"),
    (dict(k=_f32(5, 2, 16)), r"k.shape=\(5, 2, 16\) .* \(6,\)"),
    (dict(k=_f32(1, 6, 2, 16)), r"k.shape=\(1, 6, 2, 16\)"),
    (dict(q=_f32(4, 16), k=_f32(2, 16)), r"q.shape=\(4, 16\)"),
    (dict(q=_f32(6, 4, 16, dtype=jnp.int32)), "q.dtype=int32"),
    (dict(sinks=_f32(3)), r"sinks.shape=\(3,\)"),
  ],
)
def test_what_does_not_fit_without_a_cache_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _attend(with_cache=False, with_step=False, **changes)
