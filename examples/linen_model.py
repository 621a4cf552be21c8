"""A Flax Linen model over the paged cache, continued by `generate`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from paged_jax import CacheConfig, LayerKV, attend_layer
from paged_jax.generation import SamplingParams, generate
from paged_jax.nn import apply_rotary
from paged_jax.nn.linen import LinenDecoder


class TwoLayers(linen.Module):
  """Two layers of attention, each after a norm, and a head."""

  layers, vocab_size, max_len = (LayerKV(2, 16),) * 2, 256, 64

  def setup(self):
    """Creates the layers, which `__call__` and `logits` share."""
    self.embed = linen.Embed(self.vocab_size, 48)
    self.norms = [linen.LayerNorm() for _ in self.layers]
    self.qkv = [linen.DenseGeneral((8, 16)) for _ in self.layers]  # 4 + 2 + 2
    self.out = [linen.DenseGeneral(48, axis=(-2, -1)) for _ in self.layers]
    self.head = linen.Dense(self.vocab_size)

  def __call__(self, tokens, cache, step):
    """Returns the hidden states of the tokens, and the next cache."""
    positions = jnp.arange(len(tokens)) if step is None else step.positions
    x = self.embed(tokens)
    for i in range(len(self.layers)):
      q, k, v = jnp.split(self.qkv[i](self.norms[i](x)), (4, 6), axis=-2)
      q, k = (apply_rotary(part, positions, 1e4) for part in (q, k))
      y, cache = attend_layer(q, k, v, cache, step, i)
      x = x + self.out[i](y)
    return x, cache

  def logits(self, hidden):
    """Returns the logits of the next token."""
    return self.head(hidden)


def random_model():
  """Returns the module with random parameters as a `DecoderModel`."""
  run = lambda module, tokens: module.logits(module(tokens, None, None)[0])
  init = jax.jit(lambda key: TwoLayers().init(key, jnp.arange(3), method=run))
  return LinenDecoder(TwoLayers(), init(jax.random.key(0)))


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
  model = random_model()  # the tokens mean nothing
  prompts = [5, 6, 7], list(range(20)), [42]
  params, config = SamplingParams(max_new_tokens=12), CacheConfig(page_size=8)
  at_once = jax.jit(lambda x: model.logits(model(x, None, None)[0]).argmax(-1))
  for done in generate(model, prompts, params, cache=config):
    prompt, tokens = list(done.prompt_token_ids), list(done.token_ids)
    greedy = at_once(np.pad(prompt + tokens, (0, 20 - len(prompt)))).tolist()
    assert tokens == greedy[len(prompt) - 1 :][:12]
    print(f"prompt {prompt}, new tokens {tokens}, the same without a cache")
