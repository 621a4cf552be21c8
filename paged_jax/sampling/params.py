"""How the next token is chosen, row by row, inside jit.

Every option is an array over the rows, so that a batch may mix them and no
value compiles anything anew.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from paged_jax.typing import Leaf


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How one sequence is continued.

  Attributes:
    max_new_tokens: Most tokens to generate, at least 1.
    temperature: Divides the logits; 0 takes the most likely token.
    top_k: Keeps the k most likely tokens; 0 keeps all.
    top_p: Keeps the most likely tokens that together reach this probability
      (Holtzman et al., 2020), in (0, 1]; after `top_k`.
    min_p: Keeps tokens of at least this share of the top token's probability,
      in [0, 1].
    seed: Of this sequence's random numbers, in [0, 2**32). They depend on
      nothing else: neither on batchmates nor on the row.
    stop_token_ids: Tokens that end the sequence; the one that did is kept.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  stop_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ("max_new_tokens", "top_k", "seed"):
      _check_integer(name, getattr(self, name))
    if not isinstance(self.stop_token_ids, tuple):
      raise ValueError(f"{self.stop_token_ids=} must be a tuple.")
    for token in self.stop_token_ids:
      _check_integer("stop_token_ids", token)
      if not 0 <= token < 2**31:
        raise ValueError(f"{self.stop_token_ids=} must be in [0, 2**31).")
    if self.max_new_tokens < 1:
      raise ValueError(f"{self.max_new_tokens=} must be at least 1.")
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f"{self.temperature=} must be finite, at least 0.")
    if self.top_k < 0:
      raise ValueError(f"{self.top_k=} must be at least 0.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"{self.top_p=} must be in (0, 1].")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"{self.min_p=} must be in [0, 1].")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"{self.seed=} must be in [0, 2**32).")


def _check_integer(name: str, value: object) -> None:
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise ValueError(f"{name}={value!r} must be an integer.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """The `SamplingParams` of a batch."""

  temperature: Leaf  # f32[num_seqs]
  top_k: Leaf  # i32[num_seqs], vocab_size or more keeps all
  top_p: Leaf  # f32[num_seqs]
  min_p: Leaf  # f32[num_seqs]
  seed: Leaf  # u32[num_seqs]
  stop_ids: Leaf  # i32[num_seqs, most_stop_ids], NO_TOKEN where fewer


NO_TOKEN = -1  # compared with token ids only, never an index


def stack(params: Sequence[SamplingParams]) -> SamplingArrays:
  """Returns the parameters of a batch as arrays, one row each."""
  most = max(len(p.stop_token_ids) for p in params)
  # Few widths, so that few programs are compiled.
  width = 1 << max(0, most - 1).bit_length()
  stop_ids = np.full((len(params), width), NO_TOKEN, np.int32)
  for row, p in zip(stop_ids, params, strict=True):
    row[: len(p.stop_token_ids)] = p.stop_token_ids
  gather = lambda name, dtype: jnp.asarray(
    np.array([getattr(p, name) for p in params], dtype)
  )
  top_k = [min(p.top_k or np.iinfo(np.int32).max, 2**31 - 1) for p in params]
  return SamplingArrays(
    temperature=gather("temperature", np.float32),
    top_k=jnp.asarray(np.array(top_k, np.int32)),
    top_p=gather("top_p", np.float32),
    min_p=gather("min_p", np.float32),
    seed=gather("seed", np.uint32),
    stop_ids=jnp.asarray(stop_ids),
  )


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
      seed it fixes the random numbers.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw():
    keys = jax.vmap(
      lambda seed, i: jax.random.fold_in(jax.random.key(seed), i)
    )(arrays.seed, index)
    kept = _keep(logits, arrays)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
    return jnp.where(arrays.temperature > 0, drawn, greedy)

  return lax.cond(jnp.any(arrays.temperature > 0), draw, lambda: greedy)


def is_stop(tokens: Int[Array, " num_seqs"], arrays: SamplingArrays) -> Array:
  """Returns bool[num_seqs], whether each row's token ends it."""
  return jnp.any(tokens[:, None] == arrays.stop_ids, axis=-1)


def _keep(logits: Array, arrays: SamplingArrays) -> Array:
  """Returns tempered logits, -inf where top-k, top-p or min-p leaves out."""
  temperature = jnp.where(arrays.temperature > 0, arrays.temperature, 1.0)
  # The top is then 0, however small the temperature, and stays finite.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / temperature[:, None]
  wants_sort = (arrays.top_k < logits.shape[-1]) | (arrays.top_p < 1)
  # A sort of the vocabulary costs more than all the rest: only if asked for.
  least = lax.cond(
    jnp.any(wants_sort),
    lambda: _least_kept(logits, arrays),
    lambda: jnp.full(logits.shape[:1], -jnp.inf, logits.dtype),
  )
  top = jnp.max(logits, axis=-1)
  least = jnp.maximum(least, top + jnp.log(arrays.min_p))
  # Rounding must not leave out the top token itself.
  least = jnp.minimum(least, top)
  return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _least_kept(logits: Array, arrays: SamplingArrays) -> Array:
  """Returns the smallest logit that top-k and then top-p keep, per row."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  in_top_k = rank[None] < arrays.top_k[:, None]
  probability = jax.nn.softmax(ordered, axis=-1, where=in_top_k)
  before = jnp.cumsum(probability, axis=-1) - probability
  kept = in_top_k & ((before < arrays.top_p[:, None]) | (rank[None] == 0))
  return jnp.min(ordered, axis=-1, where=kept, initial=jnp.inf)
