"""A random Llama that is small enough to be recomputed by the oracle."""

import functools

import jax.numpy as jnp
import numpy as np
import oracle

from paged_jax.models import llama
from paged_jax.models.config import LlamaConfig

CONFIG = LlamaConfig(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=16,
  rope_theta=100.0,
  rms_norm_eps=1e-5,
  max_len=128,
  tie_word_embeddings=True,
)


@functools.cache
def weights(config=CONFIG, seed=0):
  rng = np.random.default_rng(seed)
  hidden, head_dim = config.hidden_size, config.head_dim
  q_size, kv_size = (
    config.num_q_heads * head_dim,
    config.num_kv_heads * head_dim,
  )
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  product = lambda out, size: normal(out, size) * np.float32(1.5 * size**-0.5)
  w = {
    # Small, so that attention outweighs the last token itself.
    "model.embed_tokens.weight": normal(config.vocab_size, hidden) / 8,
    "model.norm.weight": 1 + normal(hidden) / 4,
  }
  if not config.tie_word_embeddings:
    w["lm_head.weight"] = product(config.vocab_size, hidden)
  for i in range(config.num_layers):
    at = f"model.layers.{i}"
    w |= {
      f"{at}.input_layernorm.weight": 1 + normal(hidden) / 4,
      f"{at}.post_attention_layernorm.weight": 1 + normal(hidden) / 4,
      f"{at}.self_attn.q_proj.weight": product(q_size, hidden),
      f"{at}.self_attn.k_proj.weight": product(kv_size, hidden),
      f"{at}.self_attn.v_proj.weight": product(kv_size, hidden),
      f"{at}.self_attn.o_proj.weight": product(hidden, q_size),
      f"{at}.mlp.gate_proj.weight": product(config.intermediate_size, hidden),
      f"{at}.mlp.up_proj.weight": product(config.intermediate_size, hidden),
      f"{at}.mlp.down_proj.weight": product(hidden, config.intermediate_size),
    }
  return w


@functools.cache
def model(config=CONFIG, dtype="float32"):
  return llama.from_weights(
    config, weights(config), param_dtype=jnp.dtype(dtype)
  )


def prompts(lens, seed=1):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lens]


def prompts_of(lens):
  """Returns a prompt of each length; it depends on its length only."""
  return [prompts([length], seed=length)[0] for length in lens]


@functools.cache
def greedy(length, num_new):
  """Returns the oracle's tokens and logprobs after a prompt."""
  (prompt,) = prompts_of([length])
  return oracle.llama_greedy(CONFIG, weights(), prompt, num_new)
