"""`generate` and `stream`: the host side of generation."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import devices, sampling
from paged_jax.generation import programs
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.batch import Batch
from paged_jax.generation.rows import Status
from paged_jax.kv import layout
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.config import CacheConfig
from paged_jax.models import contract
from paged_jax.models.contract import DecoderModel
from paged_jax.sampling import SamplingParams
from pallas_kernels.common.rounding import next_power_of_two

# Fraction of the free memory for the pool. The rest is for activations.
_POOL_SHARE = 0.8
# The smallest pool, so that most short calls share one compiled program.
_LEAST_PAGES = 64
# Steps that run or wait on the device while the host reads an earlier one. With
# two, a small model waits for the host: 1.15 ms a step instead of 1.09 (135M
# parameters, 8 rows, H200).
IN_FLIGHT = 3


@dataclasses.dataclass(frozen=True)
class Completion:
  """New tokens of one prompt.

  Attributes:
    prompt_token_ids: The prompt.
    token_ids: New tokens, a stop token included: all of them from `generate`,
      those since the previous item from `stream`.
    finish_reason: `"stop"`, `"length"`, `"out_of_pages"`, `"error"` if the
      logits had a NaN, or None while the sequence is running.
    logprobs: Natural logarithm of the probability of each of `token_ids` under
      the model, before temperature and filters; None unless requested.
  """

  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  finish_reason: str | None
  logprobs: tuple[float, ...] | None


def generate(
  model: DecoderModel,
  prompts: Sequence[Sequence[int]],
  params: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  cache: CacheConfig | None = None,
  with_logprobs: bool = False,
) -> list[Completion]:
  """Continues all prompts in one batch.

  Args:
    model: The model.
    prompts: Token ids of each prompt; at least one prompt, none empty.
    params: Sampling parameters, for all prompts or one for each; greedy if
      None.
    cache: Sizes of the paged cache; see `CacheConfig` for the defaults.
    with_logprobs: Whether to return log-probabilities.

  Returns:
    One completion for each prompt, in order. A row that runs out of pages ends
    with `finish_reason="out_of_pages"` and keeps its tokens.

  Raises:
    TypeError: If the model lacks an attribute of `DecoderModel` or is not a
      pytree of arrays, or if `cache` or one of `params` has another type.
    ValueError: If there are no prompts; if a prompt is empty, is longer than
      `max_len`, is not a sequence of integers, or has a token id outside
      `[0, vocab_size)`; if `params` is not one or one for each prompt; if
      `cache.max_len` exceeds `model.max_len`, `cache.num_seqs` is less than the
      number of prompts, or `cache.num_pages` does not fit the layer groups; or
      if the model violates `DecoderModel`.
    NotImplementedError: If `cache.implementation` cannot serve the model here.
    MemoryError: If `cache.num_pages` pages, or a single page, do not fit in the
      free memory.

  Example:
    params = SamplingParams(max_new_tokens=32, temperature=0.7)
    for completion in generate(model, [[1, 15043], [1, 3186, 29889]], params):
      print(completion.token_ids, completion.finish_reason)
  """
  return join(
    stream(model, prompts, params, cache=cache, with_logprobs=with_logprobs)
  )


def stream(
  model: DecoderModel,
  prompts: Sequence[Sequence[int]],
  params: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  cache: CacheConfig | None = None,
  with_logprobs: bool = False,
) -> Iterator[list[Completion]]:
  """Continues all prompts in one batch, and yields the new tokens of each step.

  The first item is yielded after the prefill of all prompts. The device runs a
  few steps ahead of the items.

  Args:
    model: See `generate`.
    prompts: See `generate`.
    params: See `generate`.
    cache: See `generate`.
    with_logprobs: See `generate`.

  Returns:
    An iterator over lists with one completion for each prompt, in order, which
    holds the tokens since the previous item.

  Raises:
    See `generate`. Arguments are checked when `stream` is called. Errors of
    the model and of the implementation are raised by the iterator.
  """
  contract.check(model)
  contract.check_leaves(model)
  config = CacheConfig() if cache is None else cache
  if not isinstance(config, CacheConfig):
    raise TypeError(f"cache must be a CacheConfig, got {type(cache).__name__}.")
  batch = Batch.of(model, prompts, params, config)
  config = _sized(model, batch, config)
  return _run(model, batch, config, with_logprobs)


def join(items: Iterable[list[Completion]]) -> list[Completion]:
  """Concatenates the items of `stream`.

  Args:
    items: Lists with one completion for each prompt.

  Returns:
    One completion for each prompt, with the tokens of all items and the
    `finish_reason` of the last item.
  """
  tokens: list[list[int]] = []
  logprobs: list[list[float]] = []
  last: list[Completion] = []
  for last in items:
    if not tokens:
      tokens, logprobs = [[] for _ in last], [[] for _ in last]
    for i, completion in enumerate(last):
      tokens[i] += completion.token_ids
      logprobs[i] += completion.logprobs or ()
  return [
    dataclasses.replace(
      completion,
      token_ids=tuple(tokens[i]),
      logprobs=None if completion.logprobs is None else tuple(logprobs[i]),
    )
    for i, completion in enumerate(last)
  ]


def _run(
  model: DecoderModel, batch: Batch, config: CacheConfig, with_logprobs: bool
) -> Iterator[list[Completion]]:
  cache = PagedCache.init(model.layers, config)
  num_pages = min(group.table.num_pages for group in cache.groups)
  status = batch.status(num_pages, config.page_size)
  rows = rows_lib.init(
    cache,
    sampling.stack(batch.params),
    jnp.asarray(batch.max_new, jnp.int32),
    status=jnp.asarray(status),
    with_logprobs=with_logprobs,
  )
  runner = programs.Runner(model, rows)

  # 1. Prefill.
  read = _Reader(batch, status, with_logprobs)
  plans = batch.chunks(status, config.prefill_chunk)
  yield read([runner.prefill(plan) for plan in plans])

  # 2. Decode. A few steps are dispatched ahead of the one that is read.
  in_flight: collections.deque[jax.Array] = collections.deque()
  num_left = max(batch.max_new) - 1
  while not read.is_done:
    # Rows that waited for pages need more steps than new tokens.
    while not in_flight or (len(in_flight) < IN_FLIGHT and num_left > 0):
      in_flight.append(runner.decode())
      num_left -= 1
    yield read([in_flight.popleft()])


class _Reader:
  """Makes completions from the results of steps.

  Attributes:
    is_done: Whether all prompts have ended.
  """

  def __init__(self, batch: Batch, status: np.ndarray, with_logprobs: bool):
    self._prompts = batch.prompts
    self._status = status
    self._with_logprobs = with_logprobs
    self.is_done = False

  def __call__(self, packed: Sequence[jax.Array]) -> list[Completion]:
    """Waits for the results of some steps, and returns their new tokens."""
    results = [programs.unpack(np.asarray(each)) for each in packed]
    if results:
      self._status = results[-1].status
    reasons = [
      Status(status).finish_reason
      for status in self._status[: len(self._prompts)].tolist()
    ]
    self.is_done = None not in reasons
    tokens, logprobs = self._columns(results)
    return [
      Completion(prompt, tokens[row], reasons[row], logprobs[row])
      for row, prompt in enumerate(self._prompts)
    ]

  def _columns(
    self, results: list[programs.HostResult]
  ) -> tuple[list[tuple[int, ...]], list[tuple[float, ...] | None]]:
    """Returns the new tokens of each prompt, and their log-probabilities."""
    num_prompts = len(self._prompts)
    tokens: list[list[int]] = [[] for _ in range(num_prompts)]
    logprobs: list[list[float]] = [[] for _ in range(num_prompts)]
    for result in results:
      for row in np.flatnonzero(result.num_new[:num_prompts]).tolist():
        tokens[row].append(int(result.tokens[row]))
        if result.logprobs is not None:
          logprobs[row].append(float(result.logprobs[row]))
    if not self._with_logprobs:
      return [tuple(x) for x in tokens], [None] * num_prompts
    return [tuple(x) for x in tokens], [tuple(x) for x in logprobs]


def _sized(
  model: DecoderModel, batch: Batch, config: CacheConfig
) -> CacheConfig:
  """Returns the config with a value for each size that is None.

  Raises:
    MemoryError: If the pages do not fit in the free memory.
  """
  dtype = _dtype(model) if config.dtype is None else config.dtype
  layouts = layout.layouts(model.layers, config.page_size, dtype)
  free = devices.free_bytes(devices.default_device())
  config = dataclasses.replace(
    config, dtype=dtype, num_seqs=len(batch.params), max_len=batch.max_len
  )
  if config.num_pages is not None:
    counts = config.pages_of_groups(len(layouts))
    needed = sum(
      n * each.page_bytes for n, each in zip(counts, layouts, strict=True)
    )
    if free is not None and needed > free:
      raise MemoryError(
        f"num_pages={config.num_pages} take {needed} bytes, more than the "
        f"{free} free bytes of device memory."
      )
    return config
  page_bytes = sum(each.page_bytes for each in layouts)
  wanted = next_power_of_two(batch.most_pages(config.page_size))
  wanted = max(wanted, _LEAST_PAGES)
  if free is not None:
    fitting = int(free * _POOL_SHARE) // page_bytes
    if fitting < 1:
      raise MemoryError(
        f"{page_bytes=}, of a page in each layer group, must be at most "
        f"{int(free * _POOL_SHARE)}, of {free} free bytes of device memory."
      )
    # Rounded down, so that the shape does not change with the free memory.
    wanted = min(wanted, 1 << (fitting.bit_length() - 1))
  return dataclasses.replace(config, num_pages=wanted)


def _dtype(model: DecoderModel) -> np.dtype:
  """Returns the floating dtype of most parameters of a model."""
  counts: collections.Counter[np.dtype] = collections.Counter()
  for leaf in jax.tree.leaves(model):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      counts[jnp.dtype(leaf.dtype)] += leaf.size
  return max(counts, key=counts.__getitem__, default=jnp.dtype(jnp.bfloat16))
