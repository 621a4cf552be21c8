"""Replays requests on the page table.

Each replay has one compiled step function; the host calls it and keeps its
figures. Every function returns figures with one number for each step, like the
function of the same name in `count`, and raises a RuntimeError if the pool has
too few pages.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import page_table
from paged_jax.page_table import PageTable
from pallas_kernels.common.rounding import cdiv

Figures = dict[str, np.ndarray]  # i64[num_steps] by name


def batching(
  prompt_lens: Sequence[int],
  output_lens: Sequence[int],
  num_rows: int,
  page_size: int,
  num_pages: int,
) -> Figures:
  """Replays continuous batching; see `count.batching`."""
  prompts = jnp.asarray(prompt_lens, jnp.int32)
  ends = prompts + jnp.asarray(output_lens, jnp.int32) - 1
  table = _table(num_pages, page_size, num_rows, ends)
  return _replay(_batching_step, table, prompts, ends)


@functools.partial(jax.jit, donate_argnames="table")
def _batching_step(table, row_ends, next_request, prompts, ends):
  """Ends rows, starts requests in the empty ones, and grows the others."""
  table, is_empty = _end_rows(table, row_ends)
  request, starts = _take(next_request, is_empty, prompts.shape[0])
  row_ends = jnp.where(starts, ends[request], row_ends)
  grows = (~is_empty).astype(jnp.int32)
  num_new = jnp.where(starts, prompts[request], grows)
  appended = page_table.append(table, num_new)
  stats = page_table.stats(appended.table)
  figures = dict(
    live_rows=stats.live_seqs, pages=stats.pages_used, waste=stats.waste_tokens
  )
  next_request += _count(starts)
  return appended.table, row_ends, next_request, (figures, appended.ok)


def sampling(
  prompt_lens: Sequence[int],
  output_lens: Sequence[Sequence[int]],
  num_groups: int,
  page_size: int,
  num_pages: int,
) -> Figures:
  """Replays parallel sampling with forks; see `count.sampling`."""
  prompts = jnp.asarray(prompt_lens, jnp.int32)
  ends = prompts[:, None] + jnp.asarray(output_lens, jnp.int32) - 1
  num_rows = num_groups * ends.shape[1]
  table = _table(num_pages, page_size, num_rows, ends)
  return _replay(_sampling_step, table, prompts, ends)


@functools.partial(jax.jit, donate_argnames="table")
def _sampling_step(table, row_ends, next_request, prompts, ends):
  """Like `_batching_step`, with groups of rows that fork their first row."""
  num_samples = ends.shape[1]
  table, is_empty = _end_rows(table, row_ends)
  row = jnp.arange(table.num_seqs, dtype=jnp.int32)
  first = row // num_samples * num_samples
  ended = jnp.all(is_empty.reshape(-1, num_samples), axis=1)
  request, starts = _take(next_request, ended, prompts.shape[0])
  next_request += _count(starts)
  row_starts = jnp.repeat(starts, num_samples)
  row_ends = jnp.where(row_starts, ends[request].reshape(-1), row_ends)
  prompt = jnp.repeat(prompts[request], num_samples)
  prompt = jnp.where(row_starts & (row == first), prompt, 0)
  grows = (~is_empty).astype(jnp.int32)
  appended = page_table.append(table, jnp.where(is_empty, prompt, grows))
  forks = jnp.where(row_starts & (row != first), row, table.num_seqs)
  forked = page_table.fork(appended.table, first, forks)
  figures = _sharing(forked.table), appended.ok & forked.ok
  return forked.table, row_ends, next_request, figures


def beams(
  prompt_lens: Sequence[int],
  parents: Sequence[Sequence[Sequence[int]]],
  page_size: int,
  num_pages: int,
) -> Figures:
  """Replays beam searches, all in one table; see `count.beams`."""
  froms = np.asarray(parents, np.int32)
  num_groups, num_steps, width = froms.shape
  firsts = np.arange(num_groups, dtype=np.int32) * width
  prompts = np.zeros(num_groups * width, np.int32)
  prompts[firsts] = prompt_lens
  ends = jnp.asarray(prompts) + num_steps
  table = _table(num_pages, page_size, num_groups * width, ends)
  table = page_table.append(table, jnp.asarray(prompts)).table
  steps = []
  for step in range(num_steps):
    rows = jnp.asarray((firsts[:, None] + froms[:, step]).reshape(-1))
    table, figures = _beam_step(table, rows)
    steps.append(_fetch(figures))
  return _stack(steps)


@functools.partial(jax.jit, donate_argnames="table")
def _beam_step(table, parents):
  changed = page_table.permute(table, parents)
  appended = page_table.append(
    changed.table, jnp.ones_like(parents), max_new_tokens=1
  )
  num_copies = _count(appended.copies.dst < table.num_pages)
  figures = _sharing(appended.table)
  figures["copied_tokens"] = num_copies * table.page_size
  return appended.table, (figures, appended.ok & changed.ok)


def _replay(
  step: Callable, table: PageTable, prompts: jax.Array, ends: jax.Array
) -> Figures:
  """Calls a step function until all requests have ended."""
  next_request = jnp.int32(0)
  row_ends = jnp.zeros(table.num_seqs, jnp.int32)
  steps = []
  while True:
    table, row_ends, next_request, figures = step(
      table, row_ends, next_request, prompts, ends
    )
    steps.append(_fetch(figures))
    if not steps[-1]["pages"]:
      return _stack(steps[:-1])


def _fetch(figures: tuple[dict[str, jax.Array], jax.Array]) -> dict:
  """Returns the figures of a step; raises if the table refused a row."""
  values, ok = jax.device_get(figures)
  if not ok.all():
    raise RuntimeError("the page table refused a row.")
  return values


def _table(
  num_pages: int, page_size: int, num_rows: int, ends: jax.Array
) -> PageTable:
  """Returns an empty table whose rows hold the longest sequence."""
  width = cdiv(int(ends.max()), page_size)
  return page_table.init(num_pages, page_size, num_rows, width)


def _end_rows(
  table: PageTable, row_ends: jax.Array
) -> tuple[PageTable, jax.Array]:
  """Releases the rows at their end; returns the table and the empty rows."""
  table = page_table.release(table, table.kv_lens == row_ends)
  return table, table.kv_lens == 0


def _take(
  next_request: jax.Array, is_free: jax.Array, num_requests: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the next request of each free place, and which places take one."""
  rank = jnp.cumsum(is_free, dtype=jnp.int32) - 1
  request = next_request + rank
  starts = is_free & (request < num_requests)
  return jnp.where(starts, request, 0), starts


def _sharing(table: PageTable) -> dict[str, jax.Array]:
  each = page_table.pages_for(table.kv_lens, table.page_size)
  return dict(
    pages=page_table.stats(table).pages_used,
    unshared_pages=jnp.sum(each, dtype=jnp.int32),
  )


def _count(marked: jax.Array) -> jax.Array:
  return jnp.sum(marked, dtype=jnp.int32)


def _stack(steps: list[dict]) -> Figures:
  names = steps[0] if steps else ()
  return {
    name: np.asarray([step[name] for step in steps], np.int64) for name in names
  }
