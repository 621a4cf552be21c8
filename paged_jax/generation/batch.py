"""A call's prompts and parameters, checked, and padded to few shapes."""

import dataclasses
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from paged_jax import devices
from paged_jax.generation import loop
from paged_jax.kv import pool as kv_pool
from paged_jax.models.llama import Llama
from paged_jax.sampling import SamplingParams

# The least that is compiled for: most short calls then share their programs.
_LEAST_CHUNK = 64


def bucket(n: int, least: int = 1) -> int:
  """Returns the power of two from `n` up: few sizes, few compilations."""
  return max(least, 1 << max(0, n - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Size of the paged cache that `generate` makes.

  Attributes:
    page_size: Tokens a page; a positive multiple of 8.
    num_pages: Pages of the pool; None takes what the batch can need at most,
      rounded up to a power of two, within a share of the free memory.
    max_len: Longest sequence, prompt included; None is the model's own.
    dtype: Of K and V; None is that of the model. int8 and float8_e4m3fn are
      quantised, and take half the memory of bfloat16.
    prefill_chunk: Prompt tokens a step, at least 1.
    implementation: Of every op on the cache: attention, writes and page
      copies. `"mosaic_gpu"`, `"xla"`, or None to choose for each.
  """

  page_size: int = 16
  num_pages: int | None = None
  max_len: int | None = None
  dtype: DTypeLike | None = None
  prefill_chunk: int = 512
  implementation: str | None = None

  def __post_init__(self):
    devices.check_implementation(self.implementation)
    if self.page_size < 1 or self.page_size % 8:
      raise ValueError(f"{self.page_size=} must be a positive multiple of 8.")
    if self.dtype is not None and jnp.dtype(self.dtype) not in kv_pool.DTYPES:
      raise ValueError(f"{self.dtype=} must be {kv_pool.DTYPE_NAMES}.")
    for name in ("num_pages", "max_len", "prefill_chunk"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Batch:
  """The prompts and parameters of a call, padded to a bucket of rows."""

  prompts: tuple[tuple[int, ...], ...]
  params: tuple[SamplingParams, ...]  # of all rows, padding included
  max_new: tuple[int, ...]  # of all rows; no longer than `max_len` allows
  max_len: int

  @classmethod
  def of(
    cls,
    model: Llama,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    config: CacheConfig,
  ) -> "Batch":
    """Returns the batch of a call; see `generate` for its errors."""
    max_len = config.max_len or model.config.max_len
    if max_len > model.config.max_len:
      raise ValueError(
        f"{max_len=} must be at most the model's {model.config.max_len}."
      )
    ids = tuple(_token_ids(i, prompt) for i, prompt in enumerate(prompts))
    _check_prompts(ids, model.config.vocab_size, max_len)
    params = SamplingParams() if params is None else params
    if isinstance(params, SamplingParams):
      params = (params,) * len(ids)
    if len(params) != len(ids):
      raise ValueError(f"{len(params)=} must be {len(ids)=}.")
    num_rows = bucket(len(ids))
    params = (*params, *(SamplingParams(),) * (num_rows - len(ids)))
    # The last token is never stored: nothing is sampled after it.
    room = [max_len + 1 - len(prompt) for prompt in ids]
    room += [1] * (num_rows - len(ids))
    max_new = tuple(
      min(p.max_new_tokens, r) for p, r in zip(params, room, strict=True)
    )
    return cls(ids, params, max_new, max_len)

  def most_pages(self, page_size: int) -> int:
    """Pages that the batch needs if every row runs to its limit."""
    longest = zip(self.prompts, self.max_new, strict=False)
    return sum(-(-(len(p) + n - 1) // page_size) for p, n in longest)

  def status(self, num_pages: int, page_size: int) -> np.ndarray:
    """Status of each row at the start: in order, a prompt runs if it fits."""
    status = np.full(len(self.params), loop.LENGTH, np.int32)
    for row, prompt in enumerate(self.prompts):
      need = -(-len(prompt) // page_size)
      fits = need <= num_pages
      status[row] = loop.RUNNING if fits else loop.OUT_OF_PAGES
      num_pages -= need * fits
    return status

  def flatten(self, status: np.ndarray, chunk: int) -> tuple[Array, Array, int]:
    """Returns the running prompts end to end, their lengths, and the chunk.

    The tokens are padded to a bucket of whole chunks; a chunk is no longer than
    a bucket of the tokens.
    """
    running = status == loop.RUNNING
    lens = np.zeros(len(status), np.int32)
    flat: list[int] = []
    for row, prompt in enumerate(self.prompts):
      if running[row]:
        lens[row] = len(prompt)
        flat += prompt
    chunk = min(chunk, bucket(len(flat), _LEAST_CHUNK))
    tokens = np.zeros(bucket(-(-len(flat) // chunk)) * chunk, np.int32)
    tokens[: len(flat)] = flat
    return jnp.asarray(tokens), jnp.asarray(lens), chunk


def _token_ids(i: int, prompt: Sequence[int]) -> tuple[int, ...]:
  try:
    return tuple(operator.index(token) for token in prompt)
  except TypeError as error:
    raise ValueError(
      f"prompts[{i}]={prompt!r} must be a sequence of token ids."
    ) from error


def _check_prompts(prompts, vocab_size: int, max_len: int) -> None:
  if not prompts:
    raise ValueError("prompts is empty; give at least one.")
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"prompts[{i}] is empty; give at least one token.")
    if len(prompt) > max_len:
      raise ValueError(
        f"prompts[{i}] has {len(prompt)} tokens; {max_len=} is the limit."
      )
    for token in prompt:
      if not 0 <= token < vocab_size:
        raise ValueError(
          f"prompts[{i}] has token {token}; {vocab_size=} is the limit."
        )
