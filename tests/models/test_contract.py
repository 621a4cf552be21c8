"""A model that breaks the contract is reported, by name, when it is traced."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen

from paged_jax import CacheConfig, LayerKV, PagedCache, attend_layer, sampling
from paged_jax.generation import SamplingParams, generate, loop
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.rows import Plan
from paged_jax.models import contract
from paged_jax.models.contract import DecoderModel
from paged_jax.nn.linen import LinenDecoder

VOCAB, NUM_SEQS, NUM_TOKENS = 13, 2, 6
LAYERS = (LayerKV(2, 8), LayerKV(1, 4))
CONFIG = CacheConfig(
  num_pages=4,
  page_size=8,
  num_seqs=NUM_SEQS,
  max_len=16,
  dtype=jnp.float32,
)


class Toy:
  """A model of two layers without parameters that keeps the contract."""

  layers = LAYERS
  vocab_size = VOCAB
  max_len = 16

  def __call__(self, tokens, cache, step):
    hidden = tokens.astype(jnp.float32)[:, None]
    for i, layer in enumerate(LAYERS):
      shape = len(tokens), layer.num_kv_heads, layer.head_dim
      x = jnp.broadcast_to(hidden[..., :1, None], shape)
      _, cache = attend_layer(x, x, x, cache, step, i)
    return hidden, cache

  def logits(self, hidden):
    return jnp.broadcast_to(hidden, (len(hidden), VOCAB))


def test_a_model_that_is_no_pytree_is_named():
  with pytest.raises(TypeError, match="Toy must be a pytree of arrays"):
    generate(Toy(), [[1]])


def _of(run):
  """Returns a model that calls Toy, and then `run` on its outputs."""

  class Other(Toy):
    def __call__(self, tokens, cache, step):
      return run(*super().__call__(tokens, cache, step), cache)

  return Other()


def _with_logits(change):
  class Other(Toy):
    def logits(self, hidden):
      return change(super().logits(hidden))

  return Other()


def _with(**attributes):
  return type("Other", (Toy,), attributes)()


def _without(name):
  """Returns a model that has all attributes of Toy except one."""
  kept = {k: v for k, v in vars(Toy).items() if k != name and k != "__dict__"}
  return type("Other", (), kept)()


def _other_cache():
  return PagedCache.init(LAYERS, dataclasses.replace(CONFIG, num_pages=5))


def _writes_in_one_group(hidden, cache, before):
  return hidden, before.with_pool(0, cache.groups[0].pool)


def _rows(layers=LAYERS):
  return rows_lib.init(
    PagedCache.init(layers, CONFIG),
    sampling.stack([SamplingParams()] * NUM_SEQS),
    jnp.full(NUM_SEQS, 3, jnp.int32),
  )


def _trace(model):
  """Traces a step of the loops without compiling it."""
  rows = jax.eval_shape(_rows)
  plan = Plan(
    q_lens=jax.ShapeDtypeStruct((NUM_SEQS,), jnp.int32),
    tokens=jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.int32),
  )
  run = lambda rows, plan: loop.step(model, rows, plan)
  return jax.eval_shape(run, rows, plan)


def test_a_model_that_keeps_the_contract_is_taken():
  assert isinstance(Toy(), DecoderModel)
  rows, result = _trace(Toy())
  same = lambda x: (x.shape, x.dtype)
  before = jax.tree.map(same, jax.eval_shape(_rows))
  assert jax.tree.map(same, rows) == before
  assert result.tokens.shape == (NUM_SEQS, 1)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  "name", ["layers", "vocab_size", "max_len", "logits", "__call__"]
)
def test_what_a_model_lacks_is_named(name):
  message = f"Other lacks '{name}'"
  with pytest.raises(TypeError, match=message):
    contract.check(_without(name))
  with pytest.raises(TypeError, match=message):
    _trace(_without(name))


@pytest.mark.parametrize(
  ("model", "message"),
  [
    # The hidden states.
    (
      _of(lambda hidden, cache, _: (hidden[:-1], cache)),
      r"hidden of shape \(5, 1\); it must be \(6, width\)",
    ),
    (
      _of(lambda hidden, cache, _: (hidden[:, 0], cache)),
      r"hidden of shape \(6,\); it must be \(6, width\)",
    ),
    (_of(lambda hidden, cache, _: (None, cache)), "hidden of shape None"),
    # The returned values.
    (
      _of(lambda hidden, cache, _: hidden),
      r"Other must return \(hidden, cache\), got",
    ),
    (
      _of(lambda hidden, cache, _: (hidden, cache, None)),
      r"Other must return \(hidden, cache\), got",
    ),
    # The cache.
    (
      _of(lambda hidden, cache, _: (hidden, None)),
      "must return the cache that it was given, .* got NoneType",
    ),
    (
      _of(lambda hidden, cache, _: (hidden, cache.groups)),
      "must return the cache that it was given, .* got tuple",
    ),
    (
      _of(lambda hidden, cache, _: (hidden, _other_cache())),
      "must return the cache that it was given, .* of another layout",
    ),
    (
      _of(lambda hidden, cache, before: (hidden, before)),
      "a cache in which no layer of group 0 has written",
    ),
    (
      _of(_writes_in_one_group),
      "a cache in which no layer of group 1 has written",
    ),
    # Layers.
    (
      _with(layers=LAYERS[::-1]),
      r"Other.layers=\(LayerKV\(num_kv_heads=1.* must be those of the cache",
    ),
    (_with(layers=LAYERS[:1]), "Other.layers=.* must be those of the cache"),
    # Logits.
    (
      _with_logits(lambda x: x.astype(jnp.bfloat16)),
      "Other.logits returned bfloat16; it must be float32",
    ),
    (_with_logits(lambda x: (x,)), "Other.logits returned tuple"),
    (
      _with_logits(lambda x: x[:, :-1]),
      r"Other.logits returned shape \(2, 12\); it must be \(2, 13\)",
    ),
    (
      _with_logits(lambda x: x[0]),
      r"Other.logits returned shape \(13,\); it must be \(2, 13\)",
    ),
    (
      _with(vocab_size=14),
      r"Other.logits returned shape \(2, 13\); it must be \(2, 14\)",
    ),
  ],
)
def test_a_broken_contract_is_named(model, message):
  with pytest.raises(ValueError, match=message):
    _trace(model)


class LinenModel(linen.Module):
  """An embedding, one attention, and the embedding again as the head."""

  layers: tuple[LayerKV, ...] = (LayerKV(1, 8),)
  vocab_size: int = VOCAB
  max_len: int = 16

  def setup(self):
    self.embed = linen.Embed(self.vocab_size, 8)

  def __call__(self, tokens, cache, step):
    x = self.embed(tokens)[..., None, :]
    out, cache = attend_layer(x, x, x, cache, step, 0)
    return out[..., 0, :], cache

  def logits(self, hidden):
    return self.embed.attend(hidden)


def test_a_linen_module_with_its_parameters_is_a_model():
  module = LinenModel()
  tokens = jnp.zeros(NUM_TOKENS, jnp.int32)
  init = lambda: module.init(jax.random.key(0), tokens, None, None)
  model = LinenDecoder(module, jax.eval_shape(init))
  assert isinstance(model, DecoderModel)
  contract.check(model)
  assert model.layers == module.layers

  def run(model):
    plan = Plan(q_lens=jnp.array([4, 2], jnp.int32), tokens=tokens)
    return loop.step(model, _rows(model.layers), plan)

  _, result = jax.eval_shape(run, model)
  assert result.tokens.shape == (NUM_SEQS, 1)
  # Its parameters are leaves: they can be passed, donated and sharded.
  assert [x.shape for x in jax.tree.leaves(model)] == [(VOCAB, 8)]


def test_a_linen_module_that_lacks_something_is_reported():
  module = linen.Dense(3)
  with pytest.raises(TypeError, match="LinenDecoder lacks 'layers'"):
    contract.check(LinenDecoder(module, {}))
