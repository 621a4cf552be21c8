"""Chooses the next token of every row, inside jit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.sampling.params import Draws, Filters, SamplingArrays


def sample(
  logits: Float[Array, "num_seqs vocab_size"],
  arrays: SamplingArrays,
  index: Int[Array, " num_seqs"],
) -> Int[Array, " num_seqs"]:
  """Returns the next token of every row.

  Args:
    logits: f32[num_seqs, vocab_size].
    arrays: How each row samples.
    index: i32[num_seqs], how many tokens each row has sampled before; with the
      seed it determines the random numbers.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  draws = arrays.draws
  if draws is None:
    return greedy
  keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
    draws.seed, index
  )
  kept = _keep(logits, draws)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
  return jnp.where(draws.temperature > 0, drawn, greedy)


def is_stop(tokens: Int[Array, " num_seqs"], arrays: SamplingArrays) -> Array:
  """Returns bool[num_seqs], whether each row's token ends it."""
  return jnp.any(tokens[:, None] == arrays.stop_ids, axis=-1)


def logprobs(
  logits: Float[Array, "num_seqs vocab_size"],
  tokens: Int[Array, " num_seqs"],
) -> Float[Array, " num_seqs"]:
  """Returns the natural log of each token's probability under the model."""
  normal = jax.nn.logsumexp(logits, axis=-1)
  return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normal


def _keep(logits: Array, draws: Draws) -> Array:
  """Returns tempered logits, -inf where top-k, top-p or min-p leaves out."""
  temperature = jnp.where(draws.temperature > 0, draws.temperature, 1.0)
  # The top is then 0, however small the temperature, and stays finite.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / temperature[:, None]
  top = jnp.max(logits, axis=-1)
  least = top + jnp.log(draws.min_p)
  if draws.filters is not None:
    least = jnp.maximum(least, _least_kept(logits, draws.filters))
  # Rounding must not leave out the top token itself.
  least = jnp.minimum(least, top)
  return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _least_kept(logits: Array, filters: Filters) -> Array:
  """Returns the smallest logit that top-k and then top-p keep, per row."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  in_top_k = rank[None] < filters.top_k[:, None]
  probability = jax.nn.softmax(ordered, axis=-1, where=in_top_k)
  before = jnp.cumsum(probability, axis=-1) - probability
  top_p = filters.top_p[:, None]
  # Rounding must not leave out a tail that top_p=1 keeps.
  in_top_p = (before < top_p) | (top_p >= 1) | (rank[None] == 0)
  kept = in_top_k & in_top_p
  return jnp.min(ordered, axis=-1, where=kept, initial=jnp.inf)
