"""Tests of the benchmark of the page table."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import device_loop
from benchmarks.page_table import __main__ as bench_page_table
from benchmarks.page_table import parts, rivals, workload
from paged_jax import page_table

SIZES = workload.SMALL
PAGE_SIZE = SIZES.page_size
RIVALS = [
  (rivals.pop_each, rivals.stacked),
  (rivals.search_each, rivals.bitmap),
  (rivals.search_if_needed, rivals.bitmap),
  (rivals.search_once, rivals.bitmap),
]


@pytest.fixture(scope="module")
def start():
  return workload.filled(SIZES, SIZES.pools[0])


@pytest.fixture(scope="module")
def grown(start):
  """The table some steps later."""

  def grow(_, state):
    return page_table.append(state.table, one, max_new_tokens=1)

  one = jnp.ones(SIZES.num_seqs, jnp.int32)
  run = device_loop.compiled(grow, start, SIZES.num_steps)
  return run(device_loop.copy(start), ()).table


@pytest.mark.parametrize(("serve", "state"), RIVALS)
def test_rivals_serve_the_same_rows(start, grown, serve, state):
  step = lambda _, state: serve(state, PAGE_SIZE)
  begin = state(start.table)
  run = device_loop.compiled(step, begin, SIZES.num_steps)
  end = run(device_loop.copy(begin), ())
  rivals.verify(start.table, end, SIZES.num_steps)
  np.testing.assert_array_equal(end.kv_lens, grown.kv_lens)
  nothing = grown.num_pages
  np.testing.assert_array_equal(
    np.asarray(end.page_indices) < nothing,
    np.asarray(grown.page_indices) < nothing,
  )
  assert int(end.num_free) == int(grown.num_free)


@pytest.mark.parametrize(("serve", "state"), RIVALS)
def test_rivals_hand_out_no_page_that_is_not_there(start, serve, state):
  before = dataclasses.replace(
    start.table,
    num_free=jnp.asarray(0, jnp.int32),
    ref_counts=jnp.ones_like(start.table.ref_counts),
  )
  end = state(before)
  for _ in range(PAGE_SIZE):
    end = jax.jit(serve, static_argnums=1)(end, PAGE_SIZE)
  np.testing.assert_array_equal(end.page_indices, before.page_indices)
  assert int(end.num_free) == 0


def test_faults_are_found(start, grown):
  num_steps = SIZES.num_steps
  rivals.verify(start.table, grown, num_steps)
  entries = grown.page_indices
  faults = {
    "lengths": dict(kv_lens=grown.kv_lens.at[1].add(1)),
    "entries": dict(page_indices=entries.at[1, -1].set(0)),
    "old pages": dict(page_indices=entries.at[:, 0].set(entries[::-1, 0])),
    "distinct": dict(page_indices=entries.at[0, 0].set(entries[1, 0])),
    "free": dict(num_free=grown.num_free - 1),
  }
  for name, fault in faults.items():
    with pytest.raises(RuntimeError, match=name):
      rivals.verify(start.table, dataclasses.replace(grown, **fault), num_steps)


def test_a_copy_of_the_state_is_found():
  write = lambda i, values: values.at[i].set(1)
  # All old values are read after one was overwritten.
  write_and_read = lambda i, values: write(i, values) + values[::-1]
  figures = _memory(write)
  assert figures["large_copies"] == 0
  device_loop.check_in_place(figures)
  figures = _memory(write_and_read)
  assert figures["large_copies"] == 1
  with pytest.raises(RuntimeError, match="not updated in place"):
    device_loop.check_in_place(figures)


def _memory(step):
  start = jnp.zeros(4096, jnp.int32)
  program = device_loop.compiled(step, start, 8)
  return device_loop.memory(program, start, 1000)


@pytest.mark.slow
def test_figures_of_every_kind_are_taken():
  num_pages = SIZES.pools[0]
  sides = bench_page_table.append(SIZES, num_pages)
  record = {"append": {str(num_pages): sides}}
  record["transitions"] = parts.diverging(SIZES)
  record["sums"] = parts.sums(SIZES)
  record["copies"] = parts.copies(SIZES)
  record = json.loads(json.dumps(record))
  assert "append, max_new_tokens unknown" in sides
  for part in (sides, record["transitions"], record["sums"], record["copies"]):
    lines = bench_page_table.table("part", part).splitlines()
    assert len(lines) == len(part) > 0
  _assert_memory_may_not_grow(record, num_pages)


def _assert_memory_may_not_grow(record, num_pages):
  larger = copy.deepcopy(record["append"][str(num_pages)])
  record["append"][str(2 * num_pages)] = larger
  bench_page_table.check_memory(record)
  larger["append"]["temp_bytes"] += num_pages
  with pytest.raises(RuntimeError, match="append: [0-9]+ bytes"):
    bench_page_table.check_memory(record)
