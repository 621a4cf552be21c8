"""The state of the rows of a batch, and the plan and the result of one step."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax import sampling
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.page_table import arguments
from paged_jax.sampling import SamplingArrays
from paged_jax.typing import Leaf
from pallas_kernels.common.spec import check_count


class Status(enum.IntEnum):
  """The status of a row. All but RUNNING are final."""

  RUNNING = 0
  STOP = 1  # a stop token was sampled
  LENGTH = 2  # the row has its number of new tokens
  OUT_OF_PAGES = 3  # there were no pages for its tokens
  ABORTED = 4  # the caller gave it up
  ERROR = 5  # its logits had a NaN

  @property
  def finish_reason(self) -> str | None:
    """The final status in lower case; None while the row is running."""
    return None if self is Status.RUNNING else self.name.lower()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The state of a batch of sequences during generation.

  Fields that are None stay None: `init` decides on them.
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
    """Number of rows of the batch."""
    return self.status.shape[0]

  @property
  def running(self) -> Array:
    """bool[num_seqs], whether each row is running."""
    return self.status == Status.RUNNING


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """The rows that take part in one step, and their tokens.

  The tokens of the entries lie one after the other on the token axis, as in
  `begin_step`; with `max_q_len=1`, entry `i` has token `i`. Entries of rows
  that have ended change nothing.
  """

  q_lens: Leaf  # i32[num_entries], tokens of each entry, 0 for none
  # i32[num_entries], rows in order of service; an entry of a row out of range
  # is empty. None: all rows in their order.
  slots: Leaf | None = None
  # i32[num_tokens], -1 for the last token of the entry's row. None: all -1.
  tokens: Leaf | None = None
  # bool[num_entries], whether a token is sampled after the last one; False
  # inside a prompt. None: True.
  samples: Leaf | None = None
  # Upper bound of `q_lens`, if known; 1 for decode.
  max_q_len: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
  """The result of one step, for each entry of the plan."""

  tokens: Leaf  # i32[num_entries, 1], sampled
  num_new: Leaf  # i32[num_entries], how many of `tokens` are there
  status: Leaf  # i32[num_entries], a `Status`, after the step
  refused: Leaf  # bool[num_entries], running rows that found no pages
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
    cache: The cache: empty, or with the contexts that the rows continue. The
      rows own it.
    sampling_arrays: Sampling parameters of each row.
    max_new: i32[num_seqs], maximum number of new tokens of each row.
    status: i32[num_seqs], initial `Status`; all rows are running if None.
    capacity: Number of new tokens that are kept for each row, which should be
      at least `max_new`, as later tokens are dropped. If None, none are kept.
    with_logprobs: Whether to compute log-probabilities, and keep them with
      `capacity`.

  Raises:
    ValueError: If `capacity` is less than 1, or if `max_new`, `status` or
      `sampling_arrays` are not of the cache's rows.
  """
  if capacity is not None:
    check_count("capacity", capacity, 1)
  num_seqs = cache.num_seqs
  max_new = arguments.integers(max_new, (num_seqs,), "max_new")
  if status is not None:
    status = arguments.integers(status, (num_seqs,), "status")
  for leaf in jax.tree.leaves(sampling_arrays):
    if leaf.shape[0] != num_seqs:
      raise ValueError(
        f"sampling_arrays have {leaf.shape[0]} rows; the cache has {num_seqs}."
      )
  zeros = lambda: jnp.zeros(num_seqs, jnp.int32)  # each is donated
  tokens = logprobs = None
  if capacity is not None:
    tokens = jnp.zeros((num_seqs, capacity), jnp.int32)
    if with_logprobs:
      logprobs = jnp.zeros((num_seqs, capacity), jnp.float32)
  return Rows(
    cache=cache,
    last_tokens=zeros(),
    status=zeros() if status is None else status,
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
  """Returns the rows with their sampled tokens, ending those that are done.

  Args:
    rows: The rows.
    plan: The plan of the step.
    sampled: bool[num_entries], entries whose token counts.
    tokens: i32[num_entries], one token for each entry.
    logprobs: f32[num_entries], of the tokens; None if not computed.
  """
  has_new = of_rows(rows, plan, sampled)
  if plan.slots is None:
    last = jnp.where(sampled, tokens, rows.last_tokens)
  else:
    where = jnp.where(sampled, plan.slots, rows.num_seqs)
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


def of_rows(
  rows: Rows, plan: Plan, flags: Bool[Array, " num_entries"]
) -> Bool[Array, " num_seqs"]:
  """Returns the rows of the entries of a plan that have a flag."""
  if plan.slots is None:
    return flags
  where = jnp.where(flags, plan.slots, rows.num_seqs)
  return jnp.zeros(rows.num_seqs, bool).at[where].set(True, mode="drop")


def _kept(
  rows: Rows,
  plan: Plan,
  kept: Array | None,
  sampled: Array,
  new: Array | None,
) -> Array | None:
  """Returns [num_seqs, capacity] with the new values; None if not kept."""
  if kept is None or new is None:
    return None
  entry = jnp.arange(new.shape[0], dtype=jnp.int32)
  slots = entry if plan.slots is None else plan.slots
  column = rows.num_new.at[slots].get(mode="fill", fill_value=0)
  where = jnp.where(sampled, slots, rows.num_seqs)
  return kept.at[where, column].set(new, mode="drop")


def end(rows: Rows, which: Bool[Array, " num_seqs"], status: Status) -> Rows:
  """Ends the running rows of `which` with `status`; they keep their pages.

  Args:
    rows: The rows.
    which: bool[num_seqs], rows to end; those that have ended stay as they are.
    status: A final status.
  """
  ended = which & rows.running
  new_status = jnp.where(ended, jnp.int32(status), rows.status)
  return dataclasses.replace(rows, status=new_status)


def release_ended(rows: Rows) -> Rows:
  """Releases the pages of all rows that have ended."""
  cache = paged_cache.release(rows.cache, ~rows.running)
  return dataclasses.replace(rows, cache=cache)
