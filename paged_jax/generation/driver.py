"""Generation from a ragged batch of prompts: the host's side of the loops."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import devices, sampling
from paged_jax.generation import loop
from paged_jax.generation.batch import Batch, CacheConfig, bucket
from paged_jax.kv import cache as paged_cache
from paged_jax.kv import pool as kv_pool
from paged_jax.models.llama import Llama
from paged_jax.sampling import SamplingParams

# Of the free memory, what the pool may take: the rest is for the activations.
_POOL_SHARE = 0.8
# The least that is compiled for: most short calls then share their programs.
_LEAST_CAPACITY = 256
_LEAST_PAGES = 64

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
      that the model does not know; if there are no prompts, or another number
      of `params`; or if `max_len` is more than the model's.
    MemoryError: If `num_pages`, or one page, does not fit in the free memory.
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
  batch = Batch.of(model, prompts, params, config)
  num_pages = _num_pages(model, batch, config)
  return _run(model, batch, config, num_pages, with_logprobs, interval)


def _run(model, batch, config, num_pages, with_logprobs, interval):
  status = batch.status(num_pages, config.page_size)
  max_new = jnp.asarray(batch.max_new, jnp.int32)
  how = sampling.stack(batch.params)
  cache = paged_cache.init(
    num_pages=num_pages,
    num_seqs=len(batch.params),
    pages_per_seq=-(-batch.max_len // config.page_size),
    implementation=config.implementation,
    **_pool_layout(model, config),
  )
  tokens, lens, chunk = batch.flatten(status, config.prefill_chunk)
  cache, logits, ok = _prefill(model, cache, tokens, lens, chunk=chunk)
  state = _start(
    cache,
    logits,
    ok,
    jnp.asarray(status),
    max_new,
    how,
    capacity=bucket(max(batch.max_new), _LEAST_CAPACITY),
    with_logprobs=with_logprobs,
  )
  steps = jnp.asarray(interval, jnp.int32)
  while True:
    completions = _completions(batch, state, with_logprobs)
    yield completions
    if all(completion.finish_reason for completion in completions):
      return
    state = _decode(model, state, max_new, how, steps)


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
  """Returns the pages asked for, or what the batch can need and what fits."""
  wanted = config.num_pages
  free = devices.free_bytes(devices.default_device())
  page_bytes = kv_pool.page_bytes(**_pool_layout(model, config))
  if wanted is not None:
    if free is not None and wanted * page_bytes > free:
      raise MemoryError(
        f"num_pages={wanted} of {page_bytes=} take more than the {free} free "
        "bytes of device memory."
      )
    return wanted
  wanted = bucket(batch.most_pages(config.page_size), _LEAST_PAGES)
  if free is None:
    return wanted
  fitting = int(free * _POOL_SHARE) // page_bytes
  if fitting < 1:
    raise MemoryError(
      f"not one page of {page_bytes=} fits in {free} free bytes of device "
      "memory."
    )
  # Rounded, so that free memory does not choose a new shape every time.
  return min(wanted, 1 << (fitting.bit_length() - 1))
