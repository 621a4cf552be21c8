"""A Flax module of one's own over the paged cache, decoding inside jit.

One layer with random weights: the tokens mean nothing, the mechanics do.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from paged_jax.kv import cache as paged_cache
from paged_jax.nn import PagedAttention


class OneLayer(nnx.Module):
  """Embedding, paged attention, and the embedding again as the head."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(256, 64, rngs=rngs)
    self.attention = PagedAttention(64, 4, 2, 16, layer=0, rngs=rngs)

  def __call__(self, tokens, cache, step):
    """Returns the logits of a step's flat tokens, and the next cache."""
    x = self.embed(tokens)
    y, cache = self.attention(x, cache, step)
    return self.embed.attend(y), cache


@functools.partial(jax.jit, static_argnames="num_new", donate_argnames="cache")
def generate(model, cache, prompts, prompt_lens, num_new):
  """Returns [num_new, num_seqs] greedy tokens, and the cache after them."""
  cache, step = paged_cache.begin_step(cache, prompt_lens, prompts.shape[0])
  logits, cache = model(prompts, cache, step)
  first = jnp.argmax(logits[step.cu_q_lens[1:] - 1], axis=-1)

  def decode(carry, _):
    tokens, cache = carry
    cache, step = paged_cache.begin_decode(cache, prompt_lens > 0)
    logits, cache = model(tokens, cache, step)
    return (jnp.argmax(logits, axis=-1), cache), tokens

  (_, cache), tokens = lax.scan(decode, (first, cache), length=num_new)
  return tokens, cache


if __name__ == "__main__":
  cache = paged_cache.init(
    num_pages=16,
    page_size=8,
    num_seqs=3,
    pages_per_seq=4,
    num_layers=1,
    num_kv_heads=2,
    head_dim=16,
    dtype=jnp.float32,
  )
  # Three prompts of 3, 9 and 1 tokens, one after the other.
  prompts, prompt_lens = jnp.arange(13), jnp.array([3, 9, 1])
  tokens, cache = generate(
    OneLayer(nnx.Rngs(0)), cache, prompts, prompt_lens, num_new=12
  )
  for row, length in enumerate(cache.table.kv_lens.tolist()):
    print(f"sequence {row}: {length} tokens stored, new {tokens[:, row]}")
  free = int(cache.table.num_free)
  print(f"{free} of {cache.table.num_pages} pages are free")
