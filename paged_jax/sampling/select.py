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
  """Samples the next token of every row.

  A row with temperature 0 takes the most likely token. The others take
  `argmax(logits / temperature + noise)` with Gumbel noise over the tokens that
  top-k, top-p and min-p keep, which samples from their softmax.

  Args:
    logits: f32[num_seqs, vocab_size].
    arrays: Sampling parameters of each row.
    index: i32[num_seqs], number of tokens that each row has sampled before. The
      seed and this number determine the random numbers.

  Returns:
    i32[num_seqs], token ids.
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
  """Returns bool[num_seqs], whether each row's token is a stop token."""
  return jnp.any(tokens[:, None] == arrays.stop_ids, axis=-1)


def logprobs(
  logits: Float[Array, "num_seqs vocab_size"],
  tokens: Int[Array, " num_seqs"],
) -> Float[Array, " num_seqs"]:
  """Returns the natural logarithm of each token's probability.

  Args:
    logits: f32[num_seqs, vocab_size].
    tokens: i32[num_seqs], token ids.
  """
  normal = jax.nn.logsumexp(logits, axis=-1)
  return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normal


def _keep(logits: Array, draws: Draws) -> Array:
  """Returns logits / temperature, -inf for tokens that are filtered out."""
  temperature = jnp.where(draws.temperature > 0, draws.temperature, 1.0)
  # The maximum becomes 0, which stays finite at any temperature.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / temperature[:, None]
  top = jnp.max(logits, axis=-1)
  least = top + jnp.log(draws.min_p)
  if draws.filters is not None:
    least = jnp.maximum(least, _least_kept(logits, draws.filters))
  # Rounding must not remove the most likely token.
  least = jnp.minimum(least, top)
  return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _least_kept(logits: Array, filters: Filters) -> Array:
  """Returns the smallest logit of each row that top-k and then top-p keep."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  in_top_k = rank[None] < filters.top_k[:, None]
  probability = jax.nn.softmax(ordered, axis=-1, where=in_top_k)
  before = jnp.cumsum(probability, axis=-1) - probability
  top_p = filters.top_p[:, None]
  # Rounding must not remove a tail that top_p=1 keeps.
  in_top_p = (before < top_p) | (top_p >= 1) | (rank[None] == 0)
  kept = in_top_k & in_top_p
  return jnp.min(ordered, axis=-1, where=kept, initial=jnp.inf)
