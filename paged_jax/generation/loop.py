"""The generation loops: what runs inside jit, from prompt to last token.

Prefill and decode are one compiled program each. The decode loop reserves
pages, writes, attends, samples and stops on its own; the host only starts it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from paged_jax import sampling
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.models.llama import Llama
from paged_jax.sampling import SamplingArrays
from paged_jax.typing import Leaf

# Values of `Generation.status`.
RUNNING, STOP, LENGTH, OUT_OF_PAGES = range(4)
FINISH_REASONS = (None, "stop", "length", "out_of_pages")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
  """A batch of sequences while they are being continued."""

  cache: PagedCache
  last_tokens: Leaf  # i32[num_seqs], sampled, not yet in the cache
  tokens: Leaf  # i32[num_seqs, capacity], sampled so far
  logprobs: Leaf  # f32[num_seqs, capacity]; capacity 0 if not asked for
  num_new: Leaf  # i32[num_seqs], how many of `tokens` are there
  status: Leaf  # i32[num_seqs]


def prefill(
  model: Llama,
  cache: PagedCache,
  tokens: Int[Array, " num_tokens"],
  prompt_lens: Int[Array, " num_seqs"],
  *,
  chunk: int,
) -> tuple[
  PagedCache, Float[Array, "num_seqs vocab_size"], Bool[Array, " num_seqs"]
]:
  """Writes the prompts of a batch into an empty cache, chunk by chunk.

  The prompts lie one after the other on the token axis; a chunk is the next
  `chunk` tokens of it, of however many sequences. A row whose chunk finds no
  pages gives back what it has and takes no part in later chunks.

  Args:
    model: The model.
    cache: The cache; donate it.
    tokens: i32[num_tokens], all prompts, padded to a multiple of `chunk`.
    prompt_lens: i32[num_seqs], 0 for rows without a prompt.
    chunk: Tokens a step.

  Returns:
    The cache, f32[num_seqs, vocab_size] logits at the end of each prompt, and
    `ok` bool[num_seqs], False for rows whose prompt did not get its pages.
  """
  ends = jnp.cumsum(prompt_lens, dtype=jnp.int32)
  starts = ends - prompt_lens

  def step_body(i, carry):
    cache, last_hidden, served = carry
    first = i * chunk
    q_lens = jnp.minimum(ends, first + chunk) - jnp.maximum(starts, first)
    q_lens = jnp.maximum(q_lens, 0)
    cache, step = paged_cache.begin_step(cache, q_lens, chunk, rows=served)
    refused = served & (q_lens > 0) & ~step.ok
    chunk_tokens = lax.dynamic_slice(tokens, (first,), (chunk,))
    hidden, cache = model(chunk_tokens, cache, step)
    last = ends - 1 - first
    ends_here = (last >= 0) & (last < chunk) & (q_lens > 0)
    here = hidden.at[last].get(mode="clip")
    last_hidden = jnp.where(ends_here[:, None], here, last_hidden)
    return paged_cache.release(cache, refused), last_hidden, served & ~refused

  width = model.config.hidden_size
  dtype = jax.eval_shape(model.embed_tokens, tokens[:1]).dtype
  num_chunks = (ends[-1] + chunk - 1) // chunk
  num_seqs = prompt_lens.shape[0]
  carry = cache, jnp.zeros((num_seqs, width), dtype), jnp.ones(num_seqs, bool)
  cache, hidden, ok = lax.fori_loop(0, num_chunks, step_body, carry)
  return cache, model.logits(hidden), ok


def start(
  cache: PagedCache,
  logits: Float[Array, "num_seqs vocab_size"],
  ok: Bool[Array, " num_seqs"],
  status: Int[Array, " num_seqs"],
  max_new: Int[Array, " num_seqs"],
  how: SamplingArrays,
  *,
  capacity: int,
  with_logprobs: bool,
) -> Generation:
  """Samples the first token of every running row after `prefill`.

  Args:
    cache: From `prefill`.
    logits: From `prefill`.
    ok: From `prefill`; other rows that should run end with `OUT_OF_PAGES`.
    status: i32[num_seqs], RUNNING for the rows that have a prompt.
    max_new: i32[num_seqs], most new tokens of each row, at most `capacity`.
    how: How each row samples.
    capacity: Tokens the result has room for.
    with_logprobs: Whether to keep the log-probability of each token.
  """
  num_seqs = status.shape[0]
  status = jnp.where((status == RUNNING) & ~ok, OUT_OF_PAGES, status)
  state = Generation(
    cache=cache,
    last_tokens=jnp.zeros(num_seqs, jnp.int32),
    tokens=jnp.zeros((num_seqs, capacity), jnp.int32),
    logprobs=jnp.zeros((num_seqs, capacity * with_logprobs), jnp.float32),
    num_new=jnp.zeros(num_seqs, jnp.int32),
    status=status,
  )
  return _record(state, logits, status == RUNNING, max_new, how)


def decode(
  model: Llama,
  state: Generation,
  max_new: Int[Array, " num_seqs"],
  how: SamplingArrays,
  num_steps: Int[Array, ""],
) -> Generation:
  """Continues every running row, until all have ended or `num_steps` are done.

  When pages run short, of the rows that are refused the last one stops with
  `OUT_OF_PAGES` and gives its pages back; the others try again.

  Args:
    model: The model.
    state: The batch; donate it.
    max_new: i32[num_seqs], most new tokens of each row.
    how: How each row samples.
    num_steps: i32, most steps to run.

  Returns:
    The batch, later.
  """

  def wants_more(carry):
    i, state = carry
    return (i < num_steps) & jnp.any(state.status == RUNNING)

  def body(carry):
    i, state = carry
    running = state.status == RUNNING
    cache, step = paged_cache.begin_decode(state.cache, running)
    hidden, cache = model(state.last_tokens, cache, step)
    state = dataclasses.replace(state, cache=cache)
    state = _stop_one(state, running & ~step.ok)
    return i + 1, _record(state, model.logits(hidden), step.ok, max_new, how)

  _, state = lax.while_loop(wants_more, body, (jnp.int32(0), state))
  return state


def _stop_one(state: Generation, refused: Array) -> Generation:
  """Of the refused rows, stops the last and releases its pages."""
  row = jnp.arange(refused.shape[0], dtype=jnp.int32)
  last = jnp.max(jnp.where(refused, row, -1))
  victim = row == last
  return dataclasses.replace(
    state,
    cache=paged_cache.release(state.cache, victim),
    status=jnp.where(victim, OUT_OF_PAGES, state.status),
  )


def _record(
  state: Generation,
  logits: Array,
  rows: Array,
  max_new: Array,
  how: SamplingArrays,
) -> Generation:
  """Samples a token for `rows`, keeps it, and releases the rows it ends."""
  tokens = sampling.sample(logits, how, state.num_new)
  row = jnp.arange(rows.shape[0], dtype=jnp.int32)
  column = jnp.where(rows, state.num_new, state.tokens.shape[1])
  logprobs = state.logprobs
  if logprobs.shape[1]:
    normal = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = logprobs.at[row, column].set(chosen - normal, mode="drop")
  num_new = state.num_new + rows.astype(jnp.int32)
  status = jnp.where(rows & (num_new >= max_new), LENGTH, state.status)
  status = jnp.where(rows & sampling.is_stop(tokens, how), STOP, status)
  return dataclasses.replace(
    state,
    cache=paged_cache.release(state.cache, rows & (status != RUNNING)),
    last_tokens=jnp.where(rows, tokens, state.last_tokens),
    tokens=state.tokens.at[row, column].set(tokens, mode="drop"),
    logprobs=logprobs,
    num_new=num_new,
    status=status,
  )
