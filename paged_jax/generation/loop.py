"""The generation loops that run inside jit, from prompt to last token.

`step` runs one step. `prefill` and `decode` loop over steps inside one
program, for callers that embed them in their own jit. `generate` and `stream`
dispatch one step at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from paged_jax import sampling
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.rows import Plan, Result, Rows, Status
from paged_jax.kv.step import Step, begin_step
from paged_jax.models import contract
from paged_jax.models.contract import DecoderModel
from paged_jax.page_table import arguments
from pallas_kernels.common.spec import check_count


def step(model: DecoderModel, rows: Rows, plan: Plan) -> tuple[Rows, Result]:
  """Runs one step: reserves pages, runs the model, samples.

  A step only reserves pages and never releases any: rows that end keep their
  pages, and entries of ended rows change nothing. A refused row stays as it
  was. A row whose logits have a NaN samples nothing, and ends with `ERROR`.

  Args:
    model: The model.
    rows: The rows; donate them, and do not read the old ones afterwards.
    plan: Which rows take part, with which tokens.

  Returns:
    The next rows, and the result of each entry of the plan.

  Raises:
    TypeError: If the model lacks an attribute of `DecoderModel`.
    ValueError: If the model violates `DecoderModel`, or the plan does not fit
      the rows (see `begin_step`).
    NotImplementedError: If the cache's implementation cannot serve the model.
  """
  num_entries = plan.q_lens.shape[0]
  num_tokens = num_entries if plan.tokens is None else plan.tokens.shape[0]
  if plan.slots is not None:  # a negative index would count from the end
    slots = jnp.where(plan.slots < 0, rows.num_seqs, plan.slots)
    plan = dataclasses.replace(plan, slots=slots)
  running = _of_entries(plan, rows.running, False)

  # 1. Reserve pages for the tokens.
  q_lens, table_rows = plan.q_lens, plan.slots
  if plan.max_q_len == 1:
    q_lens = jnp.where(running, q_lens, 0)
  else:  # ended rows keep their span of the token axis
    table_rows = _slots(plan, num_entries)
    table_rows = jnp.where(running, table_rows, rows.num_seqs)
  cache, now = begin_step(
    rows.cache, q_lens, num_tokens, rows=table_rows, max_q_len=plan.max_q_len
  )

  # 2. Run the model.
  tokens = _tokens(rows, plan, now)
  hidden, cache = contract.run(model, tokens, cache, now)
  rows = dataclasses.replace(rows, cache=cache)

  # 3. Sample a token for each entry.
  if plan.max_q_len != 1:
    hidden = hidden.at[now.cu_q_lens[1:] - 1].get(mode="clip")
  logits = contract.logits(model, hidden)
  arrays = _sampling_of_entries(rows, plan)
  index = _of_entries(plan, rows.num_new, 0)
  new_tokens = sampling.sample(logits, arrays, index)
  logprobs = None
  if rows.with_logprobs:
    logprobs = sampling.logprobs(logits, new_tokens)
  has_token = now.ok if plan.samples is None else now.ok & plan.samples
  has_nan = sampling.has_nan(logits)
  sampled = has_token & ~has_nan
  rows = rows_lib.record(rows, plan, sampled, new_tokens, logprobs)
  failed = rows_lib.of_rows(rows, plan, has_token & has_nan)
  rows = rows_lib.end(rows, failed, Status.ERROR)
  return rows, Result(
    tokens=new_tokens[:, None],
    num_new=sampled.astype(jnp.int32),
    status=_of_entries(plan, rows.status, Status.ABORTED),
    refused=running & (plan.q_lens > 0) & ~now.ok,
    logprobs=None if logprobs is None else logprobs[:, None],
  )


def prefill_step(
  model: DecoderModel, rows: Rows, plan: Plan
) -> tuple[Rows, Result]:
  """Runs one chunk of the prompts; ended rows release their pages.

  A refused row cannot catch up on the chunk, so it ends with `OUT_OF_PAGES`.

  Args:
    model: The model.
    rows: The rows; donate them.
    plan: The chunk; `slots` must be None.

  Returns:
    The next rows, and the result of each row.

  Raises:
    ValueError: If `plan.slots` is not None; see also `step`.
  """
  if plan.slots is not None:
    raise ValueError(
      f"plan.slots must be None, to prefill all rows; got {plan.slots}."
    )
  rows, result = step(model, rows, plan)
  rows = rows_lib.end(rows, result.refused, Status.OUT_OF_PAGES)
  result = dataclasses.replace(result, status=rows.status)
  return rows_lib.release_ended(rows), result


def decode_step(model: DecoderModel, rows: Rows) -> tuple[Rows, Result]:
  """Continues every running row by one token; ended rows release their pages.

  If pages run short, the last of the refused rows ends with `OUT_OF_PAGES` and
  releases its pages. The others try again in the next step.

  Args:
    model: The model.
    rows: The rows; donate them.

  Returns:
    The next rows, and the result of each row.

  Raises:
    See `step`.
  """
  rows, result = step(model, rows, decode_plan(rows))
  row = jnp.arange(rows.num_seqs, dtype=jnp.int32)
  last = jnp.max(jnp.where(result.refused, row, -1))
  rows = rows_lib.end(rows, row == last, Status.OUT_OF_PAGES)
  result = dataclasses.replace(result, status=rows.status)
  return rows_lib.release_ended(rows), result


def decode_plan(rows: Rows) -> Plan:
  """Returns the plan that continues every running row by one token."""
  return Plan(q_lens=jnp.ones(rows.num_seqs, jnp.int32), max_q_len=1)


def prefill(
  model: DecoderModel,
  rows: Rows,
  tokens: Int[Array, " num_tokens"],
  prompt_lens: Int[Array, " num_seqs"],
  *,
  chunk: int,
) -> Rows:
  """Prefills the prompts of a batch, and samples a token after each.

  The prompts lie one after the other on the token axis, and each step runs the
  next `chunk` tokens of it. A row whose tokens find no pages ends with
  `OUT_OF_PAGES`, releases its pages, and samples nothing.

  Args:
    model: The model.
    rows: The rows; donate them.
    tokens: i32[num_tokens], all prompts, padded to a multiple of `chunk`.
    prompt_lens: i32[num_seqs], 0 for rows without a prompt.
    chunk: Tokens per step.

  Returns:
    The next rows, each with its first new token.

  Raises:
    ValueError: If `chunk` is below 1 or does not divide the number of tokens,
      `prompt_lens` has the wrong shape or is not an integer array, or, outside
      jit, `prompt_lens` are negative or exceed the tokens; see also `step`.
  """
  check_count("chunk", chunk, 1)
  num_tokens = tokens.shape[0]
  if num_tokens % chunk:
    raise ValueError(f"{tokens.shape=} must be a multiple of {chunk=}.")
  if not isinstance(prompt_lens, jax.core.Tracer):
    known = np.asarray(prompt_lens)
    if np.any(known < 0) or known.sum() > num_tokens:
      raise ValueError(
        f"prompt_lens={known.tolist()} must be at least 0, and at most "
        f"{num_tokens} tokens together."
      )
  prompt_lens = arguments.integers(prompt_lens, (rows.num_seqs,), "prompt_lens")
  ends = jnp.cumsum(prompt_lens, dtype=jnp.int32)

  def body(i, rows):
    return prefill_step(model, rows, chunk_plan(tokens, ends, i, chunk))[0]

  num_chunks = (ends[-1] + chunk - 1) // chunk
  return lax.fori_loop(0, num_chunks, body, rows)


def chunk_plan(
  tokens: Int[Array, " num_tokens"],
  ends: Int[Array, " num_seqs"],
  i: Int[Array, ""],
  chunk: int,
) -> Plan:
  """Returns the plan of the i-th chunk of the prompts.

  Args:
    tokens: i32[num_tokens], all prompts, padded to a multiple of `chunk`.
    ends: i32[num_seqs], end of each prompt on the token axis.
    i: Index of the chunk.
    chunk: Tokens per chunk.
  """
  first = i * chunk
  starts = jnp.pad(ends[:-1], (1, 0))
  last = first + chunk
  q_lens = jnp.minimum(ends, last) - jnp.maximum(starts, first)
  return Plan(
    q_lens=jnp.maximum(q_lens, 0),
    tokens=lax.dynamic_slice(tokens, (first,), (chunk,)),
    samples=(ends > first) & (ends <= last) & (ends > starts),
  )


def decode(
  model: DecoderModel, rows: Rows, num_steps: Int[Array, ""] | int
) -> Rows:
  """Continues all rows until they have ended, or for `num_steps` steps.

  Args:
    model: The model.
    rows: The rows; donate them. They keep their tokens if they were created
      with a `capacity`.
    num_steps: Maximum number of steps to run.

  Returns:
    The rows after the last step; see `decode_step`.

  Raises:
    See `step`.
  """

  def wants_more(carry):
    i, rows = carry
    return (i < num_steps) & jnp.any(rows.running)

  def body(carry):
    i, rows = carry
    rows, _ = decode_step(model, rows)
    return i + 1, rows

  _, rows = lax.while_loop(wants_more, body, (jnp.int32(0), rows))
  return rows


def _slots(plan: Plan, num_entries: int) -> Array:
  if plan.slots is None:
    return jnp.arange(num_entries, dtype=jnp.int32)
  return plan.slots


def _of_entries(plan: Plan, by_row: Array, otherwise) -> Array:
  """Gathers an array over rows for the entries of a plan."""
  if plan.slots is None:
    return by_row
  return by_row.at[plan.slots].get(mode="fill", fill_value=otherwise)


def _sampling_of_entries(rows: Rows, plan: Plan) -> sampling.SamplingArrays:
  if plan.slots is None:
    return rows.sampling
  gather = lambda x: x.at[plan.slots].get(mode="clip")
  return jax.tree.map(gather, rows.sampling)


def _tokens(rows: Rows, plan: Plan, now: Step) -> Array:
  """Returns i32[num_tokens], with -1 replaced by the last token of the row."""
  last = _of_entries(plan, rows.last_tokens, 0)
  if plan.tokens is None:
    return last
  if plan.max_q_len != 1:
    last = last.at[now.rows_of_tokens()].get(mode="clip")
  return jnp.where(plan.tokens < 0, last, plan.tokens)
