"""Checks the prompts and parameters of a call, and pads them to few shapes."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from paged_jax.generation.rows import Plan, Status
from paged_jax.kv.config import CacheConfig
from paged_jax.models.contract import DecoderModel
from paged_jax.sampling import SamplingParams
from pallas_kernels.common.rounding import cdiv, next_power_of_two

# The smallest chunk, so that most short calls share one compiled program.
_LEAST_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Batch:
  """The prompts and parameters of a call, with rows of padding."""

  prompts: tuple[tuple[int, ...], ...]
  params: tuple[SamplingParams, ...]  # for all rows, padding included
  max_new: tuple[int, ...]  # for all rows; within `max_len`
  max_len: int

  @classmethod
  def of(
    cls,
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    config: CacheConfig,
  ) -> "Batch":
    """Returns the batch of a call; see `generate` for the errors."""
    max_len = config.max_len or model.max_len
    if max_len > model.max_len:
      raise ValueError(f"{max_len=} must be at most {model.max_len=}.")
    ids = tuple(_token_ids(i, prompt) for i, prompt in enumerate(prompts))
    _check_prompts(ids, model.vocab_size, max_len)
    params = SamplingParams() if params is None else params
    if isinstance(params, SamplingParams):
      params = (params,) * len(ids)
    for i, each in enumerate(params):
      if not isinstance(each, SamplingParams):
        raise TypeError(
          f"params[{i}] must be SamplingParams, got {type(each).__name__}."
        )
    if len(params) != len(ids):
      raise ValueError(f"{len(params)=} must equal len(prompts)={len(ids)}.")
    num_rows = config.num_seqs or next_power_of_two(len(ids))
    if num_rows < len(ids):
      raise ValueError(
        f"num_seqs={num_rows} must be at least len(prompts)={len(ids)}."
      )
    params = (*params, *(SamplingParams(),) * (num_rows - len(ids)))
    # The last new token is not stored, so a row may have one more than fits.
    room = [max_len + 1 - len(prompt) for prompt in ids]
    room += [1] * (num_rows - len(ids))
    max_new = tuple(
      min(p.max_new_tokens, r) for p, r in zip(params, room, strict=True)
    )
    return cls(ids, params, max_new, max_len)

  def most_pages(self, page_size: int) -> int:
    """Returns the pages that the batch needs if every row runs to its limit."""
    longest = zip(self.prompts, self.max_new, strict=False)
    return sum(cdiv(len(p) + n - 1, page_size) for p, n in longest)

  def status(self, num_pages: int, page_size: int) -> np.ndarray:
    """Returns i32[num_rows], the initial status of each row.

    In order, a prompt runs if it fits in the remaining pages. A row whose
    prompt the device refuses ends later, in the prefill.
    """
    status = np.full(len(self.params), Status.LENGTH, np.int32)
    for row, prompt in enumerate(self.prompts):
      need = cdiv(len(prompt), page_size)
      fits = need <= num_pages
      status[row] = Status.RUNNING if fits else Status.OUT_OF_PAGES
      num_pages -= need * fits
    return status

  def chunks(self, status: np.ndarray, chunk: int) -> Iterator[Plan]:
    """Yields the plans that prefill the running prompts; see `chunk_plan`.

    The prompts lie one after the other on one token axis, and each plan has the
    next `chunk` tokens of it. Short prompts get a smaller chunk: their number
    of tokens rounded up to a power of two, but at least 64.
    """
    running = status == Status.RUNNING
    lens = np.zeros(len(status), np.int32)
    lens[: len(self.prompts)] = [len(prompt) for prompt in self.prompts]
    lens[~running] = 0
    ends = np.cumsum(lens, dtype=np.int32)
    num_tokens = int(ends[-1])
    chunk = min(chunk, max(_LEAST_CHUNK, next_power_of_two(num_tokens)))
    tokens = np.zeros(cdiv(num_tokens, chunk) * chunk, np.int32)
    given = [p for p, runs in zip(self.prompts, running, strict=False) if runs]
    tokens[:num_tokens] = [token for prompt in given for token in prompt]
    for first in range(0, num_tokens, chunk):
      last = first + chunk
      q_lens = np.minimum(ends, last) - np.maximum(ends - lens, first)
      yield Plan(
        q_lens=jnp.asarray(np.maximum(q_lens, 0)),
        tokens=jnp.asarray(tokens[first:last]),
        samples=jnp.asarray((ends > first) & (ends <= last) & (lens > 0)),
      )


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
          f"prompts[{i}] has token {token}, which must be in "
          f"[0, {vocab_size=})."
        )
