"""A model with two layer groups, decoded by the loops inside one jit."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_jax import CacheConfig, LayerKV, PagedCache, sampling
from paged_jax.generation import SamplingParams, loop, rows
from paged_jax.nn import PagedAttention


class TwoGroups(nnx.Module):
  """A windowed and a full layer, learned positions, and an ungated MLP."""

  layers = LayerKV(1, 16, sliding_window=8), LayerKV(2, 32)
  vocab_size, max_len = 256, 40

  def __init__(self, rngs: nnx.Rngs):
    more = dict(rope_theta=None, rngs=rngs)  # no rotary embedding
    self.tokens = nnx.Embed(self.vocab_size, 48, rngs=rngs)
    self.positions = nnx.Embed(self.max_len, 48, rngs=rngs)
    self.near = PagedAttention(48, 2, 1, 16, layer=0, sliding_window=8, **more)
    self.far = PagedAttention(48, 4, 2, 32, layer=1, **more)
    self.up = nnx.Linear(48, 96, rngs=rngs)
    self.down = nnx.Linear(96, 48, rngs=rngs)
    self.logits = nnx.Linear(48, self.vocab_size, rngs=rngs)

  def __call__(self, tokens, cache, step):
    """Returns the hidden states of the tokens, and the next cache."""
    positions = jnp.arange(len(tokens)) if step is None else step.positions
    x = self.tokens(tokens) + self.positions(positions)
    for attention in (self.near, self.far):
      y, cache = attention(x, cache, step)
      x = x + y
    return x + self.down(nnx.relu(self.up(x))), cache


@jax.jit(donate_argnames="state")
def generate(model, state, tokens, prompt_lens):
  """Returns the rows after prefill and 12 new tokens."""
  state = loop.prefill(model, state, tokens, prompt_lens, chunk=16)
  return loop.decode(model, state, num_steps=11)  # prefill gave one token


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
  model = TwoGroups(nnx.Rngs(0))  # random: the tokens mean nothing
  sizes = dict(num_seqs=3, num_pages=15, page_size=8, max_len=model.max_len)
  cache = PagedCache.init(model.layers, CacheConfig(**sizes, dtype=jnp.float32))
  params = sampling.stack([SamplingParams()] * 3)  # greedy
  state = rows.init(cache, params, jnp.full(3, 12), capacity=12)
  prompts = [5, 6, 7], list(range(20)), [8, 9, 3, 1, 2, 7, 6, 4, 0]  # 32 tokens
  lens = np.array([len(p) for p in prompts])
  state = generate(model, state, np.concatenate(prompts), lens)
  at_once = jax.jit(lambda x: model.logits(model(x, None, None)[0]).argmax(-1))
  for prompt, tokens in zip(prompts, state.tokens.tolist(), strict=True):
    greedy = at_once(np.pad(prompt + tokens, (0, 20 - len(prompt)))).tolist()
    assert tokens == greedy[len(prompt) - 1 :][:12]
    print(f"prompt {prompt}, new tokens {tokens}, the same without a cache")
