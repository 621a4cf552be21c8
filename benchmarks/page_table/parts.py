"""Times transitions other than `append`, sums, and copies of pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_loop
from benchmarks.harness.timing import call_us, spread_p99
from benchmarks.page_table.workload import Sizes, check, filled
from paged_jax import page_table
from paged_jax.kv import layout
from paged_jax.kv import pool as kv_pool


def transitions(sizes: Sizes) -> dict[str, dict]:
  """Returns the figures of transitions, in the smallest pool."""
  return diverging(sizes) | drafts(sizes) | shrinking(sizes)


def diverging(sizes: Sizes) -> dict[str, dict]:
  """Times rows that become forks of row 0, and then copy its last page.

  Also times `append` of as many rows without shared pages, and the forks alone.
  """
  num_rows = sizes.num_forks
  sizes = dataclasses.replace(sizes, num_seqs=num_rows)
  alone = filled(sizes, sizes.pools[0])
  one, row_0 = jnp.ones(num_rows, jnp.int32), jnp.zeros(num_rows, jnp.int32)
  inputs, none = (one, row_0), jnp.zeros((), jnp.int32)
  page_size, lens = sizes.page_size, np.asarray(alone.table.kv_lens)

  def grow(_, state, num_new, parents):
    return page_table.append(state.table, num_new, max_new_tokens=1)

  def fork(_, state, num_new, parents):
    forked = page_table.permute(state.table, parents).table
    return dataclasses.replace(state, table=forked)

  def diverge(i, state, *inputs):
    appended, num_copies = state
    appended = grow(i, fork(i, appended, *inputs), *inputs)
    copies = appended.copies.dst < appended.table.num_pages
    return appended, num_copies + jnp.sum(copies, dtype=jnp.int32)

  def verify(state):
    check(state[0].table, np.full(num_rows, lens[0] + sizes.num_steps))
    shared = np.arange(lens[0], lens[0] + sizes.num_steps) % page_size
    if int(state[1]) != np.count_nonzero(shared) * (num_rows - 1):
      raise RuntimeError(f"{int(state[1])} copies are not what was expected")

  def timed(step, start, verify):
    args = sizes.num_steps, sizes.num_calls, verify
    return device_loop.measure(step, start, *args, inputs=inputs)

  return {
    f"append, {num_rows} rows": timed(
      grow, alone, lambda s: check(s.table, lens + sizes.num_steps)
    ),
    f"permute, {num_rows} rows": timed(
      fork, alone, lambda s: check(s.table, np.full_like(lens, lens[0]))
    ),
    f"permute and append with copies, {num_rows} rows": timed(
      diverge, (alone, none), verify
    ),
  }


def drafts(sizes: Sizes) -> dict[str, dict]:
  """Times appends of several tokens, and appends that are truncated again."""
  start, num_new = filled(sizes, sizes.pools[0]), sizes.num_draft
  lens = np.asarray(start.table.kv_lens)
  num_tokens = jnp.full(sizes.num_seqs, num_new, jnp.int32)
  inputs = num_tokens, jnp.arange(sizes.num_seqs, dtype=jnp.int32)
  num_steps = sizes.num_steps // num_new

  def grow(_, state, num_tokens, rows):
    return page_table.append(state.table, num_tokens, max_new_tokens=num_new)

  def take_back(i, state, num_tokens, rows):
    grown = grow(i, state, num_tokens, rows)
    cut = page_table.truncate(grown.table, rows, state.table.kv_lens)
    return dataclasses.replace(grown, table=cut.table)

  def timed(step, end_lens):
    verify = lambda state: check(state.table, end_lens)
    args = num_steps, sizes.num_calls, verify
    return device_loop.measure(step, start, *args, inputs=inputs)

  return {
    f"append {num_new} tokens": timed(grow, lens + num_steps * num_new),
    f"append {num_new} tokens and truncate": timed(take_back, lens),
  }


def shrinking(sizes: Sizes) -> dict[str, dict]:
  """Times rows that shrink or end, one at a time and all at once."""
  start = filled(sizes, sizes.pools[0])
  lens = np.asarray(start.table.kv_lens)
  rows = jnp.arange(sizes.num_seqs, dtype=jnp.int32)
  inputs = rows, device_loop.copy(start.table.kv_lens)

  def shrink(_, state, rows, lens):
    cut = page_table.truncate(state.table, rows, state.table.kv_lens - 1)
    return dataclasses.replace(state, table=cut.table)

  def end_one(i, state, rows, lens):
    ended = page_table.release(state.table, rows == i)
    return dataclasses.replace(state, table=ended)

  def end_all(_, state, rows, lens):
    ended = page_table.release(state.table, state.table.kv_lens > 0)
    return page_table.append(ended, lens)

  def timed(step, num_steps, num_calls, end_lens):
    verify = lambda state: check(state.table, end_lens)
    args = num_steps, num_calls, verify
    return device_loop.measure(step, start, *args, inputs=inputs)

  num_rows, often = sizes.num_seqs, sizes.num_calls
  less = min(sizes.num_steps, int(lens.min()))
  return {
    "truncate by 1 token": timed(shrink, less, often, lens - less),
    "release 1 row": timed(end_one, num_rows, often, np.zeros_like(lens)),
    f"release and append {num_rows} whole rows": timed(
      end_all, sizes.search_steps, sizes.slow_calls, lens
    ),
  }


def sums(sizes: Sizes) -> dict[str, dict]:
  """Times sums over the preceding rows of each row, computed in two ways."""
  return {
    f"{name}, {num_rows} rows": device_loop.measure(
      lambda _, values, ahead=ahead: (values + ahead(values)) % 17,
      jnp.arange(num_rows, dtype=jnp.int32),
      sizes.num_steps,
      sizes.slow_calls,
      lambda values: _verify_sums(np.asarray(values), sizes.num_steps),
    )
    for num_rows in sizes.sums
    for name, ahead in (("masked", _masked_sum), ("running", _running_sum))
  }


def _masked_sum(values: jax.Array) -> jax.Array:
  row = jnp.arange(values.shape[0], dtype=jnp.int32)
  ahead = row[:, None] > row[None]
  return jnp.sum(jnp.where(ahead, values[None], 0), axis=1, dtype=jnp.int32)


def _running_sum(values: jax.Array) -> jax.Array:
  return jnp.cumsum(values, dtype=jnp.int32) - values


def _verify_sums(values: np.ndarray, num_steps: int) -> None:
  expected = np.arange(len(values))
  for _ in range(num_steps):
    expected = np.cumsum(expected) % 17
  if not np.array_equal(values, expected):
    raise RuntimeError(f"{values=} should be {expected}")


def copies(sizes: Sizes) -> dict[str, dict]:
  """Times `copy_pages` from one half of the pool to the other."""
  half, num_slots = sizes.num_kv_pages // 2, sizes.num_slots
  pool = kv_pool.init(2 * half, *sizes.kv_page, jnp.bfloat16)
  page_bytes = layout.page_bytes(*sizes.kv_page, jnp.bfloat16)
  # The rows that copy are at random slots.
  slots = np.random.default_rng(0).permutation(num_slots)
  inputs = (jnp.asarray(slots, jnp.int32),)
  result = {}
  for num_copies in sizes.copies:

    def copy(i, pool, rank, num_copies=num_copies):
      src = (i * num_copies + rank) % half
      dst = jnp.where(rank < num_copies, half + src, pool.num_pages)
      return kv_pool.copy_pages(pool, src, dst)

    def verify(pool, num_copies=num_copies):
      _verify_copies(pool, min(half, sizes.copy_steps * num_copies))

    figures = device_loop.measure(
      copy,
      _numbered(pool),
      sizes.copy_steps,
      sizes.slow_calls,
      verify,
      inputs=inputs,
      large=pool.k.size,
      goes_on=True,
    )
    if num_copies:
      num_bytes = 2 * num_copies * page_bytes
      figures["gb_per_s"] = num_bytes / figures["us"]["median"] / 1e3
    result[f"copy_pages, {num_copies} of {num_slots}"] = figures
  return result | {"copy of one array": _plain_copy(sizes, pool.k)}


@jax.jit
def _numbered(pool: kv_pool.KVPool) -> kv_pool.KVPool:
  """Returns a pool whose elements hold the number of their page."""
  number = jnp.arange(1, 1 + pool.num_pages, dtype=jnp.int32) % 251
  number = number.astype(pool.k.dtype)[:, None, None, None, None]
  return kv_pool.KVPool(
    k=jnp.broadcast_to(number, pool.k.shape),
    v=jnp.broadcast_to(-number, pool.v.shape),
  )


def _verify_copies(pool: kv_pool.KVPool, num_copied: int) -> None:
  """Checks that the first pages of the second half equal those of the first."""
  half = pool.num_pages // 2
  page = np.arange(2 * half)
  page = np.where(
    (page >= half) & (page < half + num_copied), page - half, page
  )
  for sign, pages in ((1, pool.k), (-1, pool.v)):
    expected = sign * ((1 + page) % 251)
    for number in _extremes(pages):
      if not np.array_equal(np.asarray(number, np.float32), expected):
        raise RuntimeError(f"after {num_copied} copies the pages are wrong")


@jax.jit
def _extremes(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the least and the greatest element of each page."""
  return pages.min(axis=(1, 2, 3, 4)), pages.max(axis=(1, 2, 3, 4))


def _plain_copy(sizes: Sizes, pages: jax.Array) -> dict:
  """Times a copy of the keys of the whole pool."""
  copy = jax.jit(jnp.copy).lower(pages).compile()
  jax.block_until_ready(copy(pages))
  us = call_us(lambda: copy(pages), sizes.slow_calls)
  figures = {"us": spread_p99(us), "steps": 1, "calls": len(us)}
  num_bytes = 2 * pages.size * pages.dtype.itemsize
  return figures | {"gb_per_s": num_bytes / figures["us"]["median"] / 1e3}
