"""Chooses the next token of every row, inside jit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  scaled = _scale(logits, draws)
  if draws.filters is None:
    least = jnp.log(draws.min_p)[:, None]
    kept = jnp.where(scaled >= least, scaled, -jnp.inf)
    drawn = jnp.argmax(kept + noise, axis=-1)
  else:
    # Filters keep the tokens before some rank; of equal logits, the token with
    # the lowest id has the lowest rank.
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
    of_rank = lambda x: jnp.take_along_axis(x, order, axis=-1)
    kept = _keep(of_rank(scaled), draws.min_p, draws.filters)
    best = jnp.argmax(kept + of_rank(noise), axis=-1, keepdims=True)
    drawn = jnp.take_along_axis(order, best, axis=-1)[:, 0]
  return jnp.where(draws.temperature > 0, drawn.astype(jnp.int32), greedy)


def has_nan(
  logits: Float[Array, "num_seqs vocab_size"],
) -> Bool[Array, " num_seqs"]:
  """Returns whether each row has a NaN, which then is its argmax.

  Args:
    logits: f32[num_seqs, vocab_size].
  """
  top = jnp.argmax(logits, axis=-1, keepdims=True)
  return jnp.isnan(jnp.take_along_axis(logits, top, axis=-1)[:, 0])


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


def _scale(logits: Array, draws: Draws) -> Array:
  """Returns logits / temperature, less their maximum."""
  temperature = jnp.where(draws.temperature > 0, draws.temperature, 1.0)
  # The maximum becomes 0, which stays finite at any temperature, also if it is
  # infinite.
  top = jnp.max(logits, axis=-1, keepdims=True)
  logits = jnp.where(logits == top, 0.0, logits - top)
  return logits / temperature[:, None]


def _keep(ordered: Array, min_p: Array, filters: Filters) -> Array:
  """Returns descending logits, -inf from the first that the filters remove.

  Args:
    ordered: f32[num_seqs, vocab_size], descending from 0.
    min_p: f32[num_seqs], least share of the top probability.
    filters: Top-k, and top-p of what it keeps.
  """
  rank = jnp.arange(ordered.shape[-1], dtype=jnp.int32)[None]
  keeps = rank < filters.top_k[:, None]
  probability = jax.nn.softmax(ordered, axis=-1, where=keeps)
  before = jnp.cumsum(probability, axis=-1) - probability
  top_p = filters.top_p[:, None]
  # Rounding must not remove a tail that top_p=1 keeps.
  keeps &= (before < top_p) | (top_p >= 1)
  keeps &= ordered >= jnp.log(min_p)[:, None]
  return jnp.where(keeps | (rank == 0), ordered, -jnp.inf)
