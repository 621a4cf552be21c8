"""A custom Flax NNX model over the paged cache, decoding inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from paged_jax import CacheConfig, LayerKV, PagedCache, begin_step
from paged_jax.nn import PagedAttention


class OneLayer(nnx.Module):
  """An embedding, paged attention, and the tied embedding as the head."""

  layers, vocab_size, max_len = (LayerKV(2, 16),), 256, 24

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(self.vocab_size, 64, rngs=rngs)
    self.attention = PagedAttention(64, 4, 2, 16, layer=0, rngs=rngs)

  def __call__(self, tokens, cache, step):
    """Returns the hidden states of the tokens, and the next cache."""
    return self.attention(self.embed(tokens), cache, step)

  def logits(self, hidden):
    """Returns the logits of the next token."""
    return self.embed.attend(hidden)


@jax.jit(static_argnames="num_new", donate_argnames="cache")
def generate(model, cache, prompts, prompt_lens, num_new):
  """Returns [num_new, num_seqs] greedy tokens, and the cache after them."""
  cache, step = begin_step(cache, prompt_lens, len(prompts))
  hidden, cache = model(prompts, cache, step)
  hidden = hidden[step.cu_q_lens[1:] - 1]  # of the last token of each prompt

  def decode(carry, _):
    hidden, cache = carry
    tokens = jnp.argmax(model.logits(hidden), axis=-1)
    cache, step = begin_step(cache, jnp.ones_like(tokens), 3, max_q_len=1)
    return model(tokens, cache, step), tokens

  (_, cache), tokens = lax.scan(decode, (hidden, cache), length=num_new)
  return tokens, cache


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
  model = OneLayer(nnx.Rngs(0))  # random: the tokens mean nothing
  sizes = dict(num_seqs=3, num_pages=9, page_size=8, max_len=model.max_len)
  cache = PagedCache.init(model.layers, CacheConfig(**sizes, dtype=jnp.float32))
  prompts = [5, 6, 7], [8, 1, 9, 2, 4, 6, 5, 3, 7], [42]
  tokens, lens = np.concatenate(prompts), np.array([len(p) for p in prompts])
  new, cache = generate(model, cache, tokens, lens, num_new=12)
  at_once = jax.jit(lambda x: model.logits(model(x, None, None)[0]).argmax(-1))
  for prompt, tokens in zip(prompts, new.T.tolist(), strict=True):
    greedy = at_once(np.pad(prompt + tokens, (0, 12 - len(prompt)))).tolist()
    assert tokens == greedy[len(prompt) - 1 :][:12]
    print(f"prompt {prompt}, new tokens {tokens}, the same without a cache")
