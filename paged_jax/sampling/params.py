"""Sampling parameters of a sequence, and their arrays for a batch."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.typing import Leaf
from pallas_kernels.common.rounding import next_power_of_two


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Sampling parameters of one sequence.

  Attributes:
    max_new_tokens: Maximum number of tokens to generate, at least 1.
    temperature: Divides the logits, at least 0; 0 takes the most likely token.
    top_k: Keeps the k most likely tokens; 0 keeps all.
    top_p: Keeps the smallest set of most likely tokens whose probability
      reaches this value (nucleus sampling, Holtzman et al., 2020), in (0, 1].
      Applied after `top_k`.
    min_p: Keeps tokens with at least this fraction of the most likely token's
      probability, in [0, 1].
    seed: Seed of the random numbers, in [0, 2**32). They depend on the seed and
      on the number of tokens sampled before, not on the row or the batch.
    stop_token_ids: Tokens in [0, 2**31) that end the sequence. The token that
      ends it is kept.

  Raises:
    ValueError: If a field has the wrong type or is out of its range.
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
class Filters:
  """Parameters that remove unlikely tokens, which need a sort of the logits."""

  top_k: Leaf  # i32[num_seqs], vocab_size or more keeps all
  top_p: Leaf  # f32[num_seqs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """Parameters of rows that sample at random."""

  temperature: Leaf  # f32[num_seqs], 0 takes the most likely token
  min_p: Leaf  # f32[num_seqs]
  seed: Leaf  # u32[num_seqs]
  filters: Filters | None  # None if no row uses top_k or top_p


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """The `SamplingParams` of a batch.

  Whether any row samples at random, and whether any row filters, is part of the
  pytree structure, so a change compiles a new program. A change of values does
  not.
  """

  stop_ids: Leaf  # i32[num_seqs, max_stop_ids], padded with NO_TOKEN
  draws: Draws | None  # None if all rows take the most likely token


NO_TOKEN = -1  # only compared with token ids, never used as an index
_KEEP_ALL = 2**31 - 1
# Uniform, up to rounding. The inverse of a much greater one is 0 in float32,
# and 0 times a logit of -inf is NaN.
_MAX_TEMPERATURE = 1e30


def stack(params: Sequence[SamplingParams]) -> SamplingArrays:
  """Returns the parameters of a batch as arrays.

  Args:
    params: One for each row, at least one.

  Raises:
    ValueError: If `params` is empty.
  """
  if not params:
    raise ValueError("params is empty; give at least one.")
  most = max(len(p.stop_token_ids) for p in params)
  # A power of two, so that few programs are compiled.
  width = next_power_of_two(most)
  stop_ids = np.full((len(params), width), NO_TOKEN, np.int32)
  for row, p in zip(stop_ids, params, strict=True):
    row[: len(p.stop_token_ids)] = p.stop_token_ids
  column = lambda name, dtype: jnp.asarray(
    np.array([getattr(p, name) for p in params], dtype)
  )
  drawing = [p for p in params if p.temperature > 0]
  draws = filters = None
  if any(p.top_k or p.top_p < 1 for p in drawing):
    top_k = [min(p.top_k or _KEEP_ALL, _KEEP_ALL) for p in params]
    filters = Filters(
      top_k=jnp.asarray(np.array(top_k, np.int32)),
      top_p=column("top_p", np.float32),
    )
  if drawing:
    temperature = [min(p.temperature, _MAX_TEMPERATURE) for p in params]
    draws = Draws(
      temperature=jnp.asarray(np.array(temperature, np.float32)),
      min_p=column("min_p", np.float32),
      seed=column("seed", np.uint32),
      filters=filters,
    )
  return SamplingArrays(stop_ids=jnp.asarray(stop_ids), draws=draws)
