"""The state of rows that are being continued, and what one step is asked."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax import sampling
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.sampling import SamplingArrays
from paged_jax.typing import Leaf


class Status(enum.IntEnum):
  """What becomes of a row. All but RUNNING are ends, and frozen."""

  RUNNING = 0
  STOP = 1  # a stop token was sampled
  LENGTH = 2  # the row has its number of new tokens
  OUT_OF_PAGES = 3  # there were no pages for its tokens
  ABORTED = 4  # the caller gave it up
  ERROR = 5  # its logits were unusable

  @property
  def finish_reason(self) -> str | None:
    """The end in lower case, None while the row is running."""
    return None if self is Status.RUNNING else self.name.lower()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch of sequences while they are being continued.

  Arrays that are None stay None: they are fixed when the rows are made.
  """

  cache: PagedCache
  last_tokens: Leaf  # i32[num_seqs], sampled, not yet in the cache
  status: Leaf  # i32[num_seqs], a `Status`
  max_new: Leaf  # i32[num_seqs], most new tokens of each row
  num_new: Leaf  # i32[num_seqs], new tokens so far
  sampling: SamplingArrays
  tokens: Leaf | None = None  # i32[num_seqs, capacity], new tokens so far
  logprobs: Leaf | None = None  # f32[num_seqs, capacity], of `tokens`
  # Whether steps compute log-probabilities.
  with_logprobs: bool = dataclasses.field(
    default=False, metadata=dict(static=True)
  )

  @property
  def num_seqs(self) -> int:
    """Rows of the batch."""
    return self.status.shape[0]

  @property
  def running(self) -> Array:
    """bool[num_seqs], rows that go on."""
    return self.status == Status.RUNNING


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step does: which rows take part, with which tokens.

  The tokens of entry `i` lie one after the other on the token axis, as in
  `begin_step`; with `max_q_len=1`, token `i` is that of entry `i`. Entries of
  rows that have ended change nothing.
  """

  q_lens: Leaf  # i32[num_entries], tokens of each entry, 0 for none
  # i32[num_entries], rows in order of service, num_seqs for none. None: all
  # rows in their order.
  slots: Leaf | None = None
  # i32[num_tokens], -1 for the last token of the entry's row. None: all -1.
  tokens: Leaf | None = None
  # bool[num_entries], whether a token is sampled after the last one; False
  # inside a prompt. None: True.
  samples: Leaf | None = None
  max_q_len: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
  """What one step did, entry by entry."""

  tokens: Leaf  # i32[num_entries, 1], sampled
  num_new: Leaf  # i32[num_entries], how many of `tokens` are there
  status: Leaf  # i32[num_entries], a `Status`, after the step
  refused: Leaf  # bool[num_entries], running rows that found no room
  logprobs: Leaf | None  # f32[num_entries, 1]


def init(
  cache: PagedCache,
  sampling_arrays: SamplingArrays,
  max_new: Int[Array, " num_seqs"],
  *,
  status: Int[Array, " num_seqs"] | None = None,
  capacity: int | None = None,
  with_logprobs: bool = False,
) -> Rows:
  """Returns rows without new tokens.

  Args:
    cache: The cache; empty, or with the context that the rows continue.
    sampling_arrays: How each row samples.
    max_new: i32[num_seqs], most new tokens of each row.
    status: i32[num_seqs]; all rows run if None.
    capacity: Tokens that are kept for each row; none are if None. At least
      `max_new`: later ones are dropped.
    with_logprobs: Whether log-probabilities are computed, and kept.
  """
  num_seqs = cache.num_seqs
  zeros = lambda: jnp.zeros(num_seqs, jnp.int32)  # each is donated
  tokens = logprobs = None
  if capacity is not None:
    tokens = jnp.zeros((num_seqs, capacity), jnp.int32)
    if with_logprobs:
      logprobs = jnp.zeros((num_seqs, capacity), jnp.float32)
  return Rows(
    cache=cache,
    last_tokens=zeros(),
    status=zeros() if status is None else jnp.asarray(status, jnp.int32),
    max_new=max_new,
    num_new=zeros(),
    sampling=sampling_arrays,
    tokens=tokens,
    logprobs=logprobs,
    with_logprobs=with_logprobs,
  )


def record(
  rows: Rows,
  plan: Plan,
  sampled: Bool[Array, " num_entries"],
  tokens: Int[Array, " num_entries"],
  logprobs: Array | None,
) -> Rows:
  """Returns the rows with their sampled tokens, and the ends these make.

  Args:
    rows: The rows.
    plan: The plan of the step.
    sampled: bool[num_entries], entries whose token counts.
    tokens: i32[num_entries], one for each entry.
    logprobs: f32[num_entries], of the tokens; None if not computed.
  """
  if plan.slots is None:
    has_new, last = sampled, jnp.where(sampled, tokens, rows.last_tokens)
  else:
    where = jnp.where(sampled, plan.slots, rows.num_seqs)
    has_new = jnp.zeros(rows.num_seqs, bool).at[where].set(True, mode="drop")
    last = rows.last_tokens.at[where].set(tokens, mode="drop")
  num_new = rows.num_new + has_new.astype(jnp.int32)
  status = rows.status
  status = jnp.where(has_new & (num_new >= rows.max_new), Status.LENGTH, status)
  is_stop = sampling.is_stop(last, rows.sampling)
  status = jnp.where(has_new & is_stop, Status.STOP, status)
  return dataclasses.replace(
    rows,
    last_tokens=last,
    status=status.astype(jnp.int32),
    num_new=num_new,
    tokens=_kept(rows, plan, rows.tokens, sampled, tokens),
    logprobs=_kept(rows, plan, rows.logprobs, sampled, logprobs),
  )


def _kept(
  rows: Rows,
  plan: Plan,
  kept: Array | None,
  sampled: Array,
  new: Array | None,
) -> Array | None:
  """Returns [num_seqs, capacity] with a new value for each entry, if kept."""
  if kept is None or new is None:
    return None
  entry = jnp.arange(new.shape[0], dtype=jnp.int32)
  slots = entry if plan.slots is None else plan.slots
  column = rows.num_new.at[slots].get(mode="fill", fill_value=0)
  where = jnp.where(sampled, slots, rows.num_seqs)
  return kept.at[where, column].set(new, mode="drop")


def end(rows: Rows, which: Bool[Array, " num_seqs"], status: Status) -> Rows:
  """Returns the rows with some that ran ended; their pages stay theirs."""
  ended = which & rows.running
  new_status = jnp.where(ended, jnp.int32(status), rows.status)
  return dataclasses.replace(rows, status=new_status)


def release_ended(rows: Rows) -> Rows:
  """Returns the rows, with the pages of all that have ended given back."""
  cache = paged_cache.release(rows.cache, ~rows.running)
  return dataclasses.replace(rows, cache=cache)
