"""Generation from a ragged batch of prompts: the host's side of the loops."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paged_jax import cache as paged_cache
from paged_jax import devices, kv_pool
from paged_jax.generation import loop, sampling
from paged_jax.generation.sampling import SamplingParams
from paged_jax.models.llama import Llama

# Of the free memory, what the pool may take: the rest is for the activations.
_POOL_SHARE = 0.8

_prefill = jax.jit(
  loop.prefill,
  static_argnames=("chunk",),
  donate_argnames=("cache",),
)
_start = jax.jit(
  loop.start,
  static_argnames=("capacity", "with_logprobs"),
  donate_argnames=("cache",),
)
_decode = jax.jit(loop.decode, donate_argnames=("state",))


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was generated for one prompt.

  Attributes:
    prompt_token_ids: The prompt.
    token_ids: New tokens only, a stop token included.
    finish_reason: `"stop"`, `"length"`, `"out_of_pages"`, or None while the
      sequence is running.
    logprobs: Natural log of each new token's probability under the model,
      before temperature and filters; None unless asked for.
  """

  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  finish_reason: str | None
  logprobs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Size of the paged cache that `generate` makes.

  Attributes:
    page_size: Tokens a page; a positive multiple of 8.
    num_pages: Pages of the pool; None takes what the batch can need at most,
      up to a share of the device's free memory.
    max_len: Longest sequence, prompt included; None is the model's own.
    dtype: Of K and V; None is that of the model.
    prefill_chunk: Prompt tokens a step, at least 1.
  """

  page_size: int = 16
  num_pages: int | None = None
  max_len: int | None = None
  dtype: DTypeLike | None = None
  prefill_chunk: int = 512

  def __post_init__(self):
    if self.page_size < 1 or self.page_size % 8:
      raise ValueError(f"{self.page_size=} must be a positive multiple of 8.")
    for name in ("num_pages", "max_len", "prefill_chunk"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def generate(
  model: Llama,
  prompts: Sequence[Sequence[int]],
  params: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  cache: CacheConfig | None = None,
  with_logprobs: bool = False,
) -> list[Completion]:
  """Continues every prompt, all in one batch.

  Args:
    model: The model.
    prompts: Token ids of each prompt; at least one, none of them empty.
    params: How to sample: one for all, or one for each prompt; greedy if None.
    cache: Size of the paged cache.
    with_logprobs: Whether to return log-probabilities.

  Returns:
    One completion for each prompt, in order.

  Raises:
    ValueError: If a prompt is empty, longer than `max_len`, or has a token
      that the model does not know; or if there are no prompts, or another
      number of `params`.
    MemoryError: If not one page fits in the free memory.
  """
  *_, last = stream(
    model,
    prompts,
    params,
    cache=cache,
    with_logprobs=with_logprobs,
    interval=np.iinfo(np.int32).max,
  )
  return last


def stream(
  model: Llama,
  prompts: Sequence[Sequence[int]],
  params: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  cache: CacheConfig | None = None,
  with_logprobs: bool = False,
  interval: int = 8,
) -> Iterator[list[Completion]]:
  """Like `generate`, but yields what there is every `interval` steps.

  Args:
    model: See `generate`, as for the next four.
    prompts: Token ids of each prompt.
    params: How to sample.
    cache: Size of the paged cache.
    with_logprobs: Whether to return log-probabilities.
    interval: Decode steps between two yields, at least 1. They run in one
      compiled program, whatever the number.

  Returns:
    An iterator over the batch as it grows. Arguments are checked at once, not
    at the first `next`.

  Raises:
    ValueError: As `generate`, or if `interval` is below 1.
    MemoryError: As `generate`.
  """
  if interval < 1:
    raise ValueError(f"{interval=} must be at least 1.")
  config = cache or CacheConfig()
  batch = _Batch.of(model, prompts, params, config)
  return _run(model, batch, config, with_logprobs, interval)


@dataclasses.dataclass(frozen=True)
class _Batch:
  """The prompts and parameters of a call, padded to a bucket of rows."""

  prompts: tuple[tuple[int, ...], ...]
  params: tuple[SamplingParams, ...]  # of all rows, padding included
  max_new: tuple[int, ...]  # of all rows; no longer than `max_len` allows
  max_len: int

  @classmethod
  def of(cls, model, prompts, params, config) -> "_Batch":
    max_len = config.max_len or model.config.max_len
    prompts = tuple(tuple(int(t) for t in prompt) for prompt in prompts)
    _check_prompts(prompts, model.config.vocab_size, max_len)
    params = params or SamplingParams()
    if isinstance(params, SamplingParams):
      params = (params,) * len(prompts)
    if len(params) != len(prompts):
      raise ValueError(f"{len(params)=} must be {len(prompts)=}.")
    num_rows = _bucket(len(prompts))
    params = (*params, *(SamplingParams(),) * (num_rows - len(prompts)))
    # The last token is never stored: nothing is sampled after it.
    room = [max_len + 1 - len(prompt) for prompt in prompts]
    room += [1] * (num_rows - len(prompts))
    max_new = tuple(
      min(p.max_new_tokens, r) for p, r in zip(params, room, strict=True)
    )
    return cls(prompts, params, max_new, max_len)

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


def _run(model, batch, config, with_logprobs, interval):
  num_pages = config.num_pages or _num_pages(model, batch, config)
  status = batch.status(num_pages, config.page_size)
  max_new = jnp.asarray(batch.max_new, jnp.int32)
  how = sampling.stack(batch.params)
  cache = paged_cache.init(
    num_pages=num_pages,
    num_seqs=len(batch.params),
    pages_per_seq=-(-batch.max_len // config.page_size),
    **_pool_layout(model, config),
  )
  tokens, lens, chunk = _flatten(batch.prompts, status, config.prefill_chunk)
  cache, logits = _prefill(model, cache, tokens, lens, chunk=chunk)
  state = _start(
    cache,
    logits,
    jnp.asarray(status),
    max_new,
    how,
    capacity=_bucket(max(batch.max_new)),
    with_logprobs=with_logprobs,
  )
  steps = jnp.asarray(interval, jnp.int32)
  while True:
    completions = _completions(batch, state, with_logprobs)
    yield completions
    if all(completion.finish_reason for completion in completions):
      return
    state = _decode(model, state, max_new, how, steps)


def _flatten(prompts, status, chunk):
  """Returns the running prompts end to end, their lengths, and the chunk.

  The tokens are padded to a bucket of whole chunks; a chunk is no longer than
  a bucket of the tokens.
  """
  lens = np.zeros(len(status), np.int32)
  lens[: len(prompts)] = [len(prompt) for prompt in prompts]
  lens[status != loop.RUNNING] = 0
  flat = [
    t for prompt, n in zip(prompts, lens, strict=False) if n for t in prompt
  ]
  chunk = min(chunk, _bucket(len(flat)))
  tokens = np.zeros(_bucket(-(-len(flat) // chunk)) * chunk, np.int32)
  tokens[: len(flat)] = flat
  return jnp.asarray(tokens), jnp.asarray(lens), chunk


def _completions(batch, state, with_logprobs) -> list[Completion]:
  tokens, logprobs, num_new, status = jax.device_get(
    (state.tokens, state.logprobs, state.num_new, state.status)
  )
  return [
    Completion(
      prompt_token_ids=prompt,
      token_ids=tuple(tokens[row, : num_new[row]].tolist()),
      finish_reason=loop.FINISH_REASONS[status[row]],
      logprobs=(
        tuple(logprobs[row, : num_new[row]].tolist()) if with_logprobs else None
      ),
    )
    for row, prompt in enumerate(batch.prompts)
  ]


def _pool_layout(model, config) -> dict:
  """Returns the arguments of the pool but for its number of pages."""
  shape = model.config
  return dict(
    num_layers=shape.num_layers,
    num_kv_heads=shape.num_kv_heads,
    head_dim=shape.head_dim,
    page_size=config.page_size,
    dtype=config.dtype or model.embed_tokens.embedding.dtype,
  )


def _num_pages(model, batch, config) -> int:
  """Returns what the batch can need, or what fits in the free memory."""
  wanted = _bucket(batch.most_pages(config.page_size))
  free = devices.free_bytes(devices.default_device())
  if free is None:
    return wanted
  page_bytes = kv_pool.page_bytes(**_pool_layout(model, config))
  fitting = int(free * _POOL_SHARE) // page_bytes
  if fitting < 1:
    raise MemoryError(
      f"not one page of {page_bytes=} fits in {free} free bytes of device "
      "memory."
    )
  return min(wanted, fitting)


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


def _bucket(n: int) -> int:
  """Returns the power of two from `n` up: few sizes, few compilations."""
  return 1 << max(0, n - 1).bit_length()
