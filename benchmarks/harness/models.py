"""Models with random parameters, in the shapes of published models."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.harness.batches import DTYPE
from paged_jax.models.config import LlamaConfig
from paged_jax.models.llama import Llama

LLAMA_8B = LlamaConfig(
  vocab_size=128_256,
  hidden_size=4096,
  intermediate_size=14_336,
  num_layers=32,
  num_q_heads=32,
  num_kv_heads=8,
  head_dim=128,
  rope_theta=500_000.0,
  rms_norm_eps=1e-5,
  max_len=131_072,
  tie_word_embeddings=False,
)
SMOLLM_135M = LlamaConfig(
  vocab_size=49_152,
  hidden_size=576,
  intermediate_size=1536,
  num_layers=30,
  num_q_heads=9,
  num_kv_heads=3,
  head_dim=64,
  rope_theta=100_000.0,
  rms_norm_eps=1e-5,
  max_len=8192,
  tie_word_embeddings=True,
)


def random_model(config: LlamaConfig) -> Llama:
  """Returns a model with random parameters, made on the device."""
  build = lambda: Llama(config, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(nnx.eval_shape(build))
  for i, (_, variable) in enumerate(nnx.to_flat_state(state)):
    shape = variable.shape
    if len(shape) == 1:
      variable.set_value(jnp.ones(shape, DTYPE))
    else:
      # With a larger deviation, rounding errors grow from layer to layer.
      std = shape[0] ** -0.5
      variable.set_value(normal(jax.random.key(i), shape, std))
  return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
  """Returns normally distributed numbers in `DTYPE`."""
  return std * jax.random.normal(key, shape, DTYPE)
