"""Known scenarios of the page managers of serving engines.

They come from vLLM's tests of its KV cache manager and from the documentation
of continuous batching by Hugging Face, as far as they concern pages. Page sizes
below 8 are scaled up, with the lengths.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from pages import (
  append,
  assert_same,
  assert_valid,
  change,
  counts,
  i32,
  jitted,
  pages,
  release,
)

from paged_jax import page_table
from paged_jax.kv import pool as kv_pool


def _adopt(table, row, entries, kv_len):
  blank = [table.num_pages] * (table.pages_per_seq - len(entries))
  table, ok = change("adopt", table, row, entries + blank, kv_len)
  assert ok
  return table


def _two_prompts():
  """Returns A with 55 tokens, and B with the first 48 of them and 5 others."""
  table = page_table.init(10, 16, 3, 10)
  table, _, _ = append(table, 55, 0, 0)
  prefix = pages(table, 0)[:3]
  table, _ = change("hold", table, prefix)
  table = _adopt(table, 1, prefix, 48)
  table, ok, copies = append(table, 0, 5, 0)
  assert ok == [True] * 3
  assert copies == []
  return table, prefix


@pytest.mark.slow
def test_sharing_while_live():
  table, prefix = _two_prompts()
  assert pages(table, 1)[:3] == prefix
  assert len(pages(table, 1)) == 4
  assert pages(table, 1)[3] not in pages(table, 0)
  assert counts(table, 0) == [3, 3, 3, 1]  # two rows and a hold
  assert int(table.num_free) == 5
  assert_valid(table)


def test_hit_on_pages_of_ended_sequences():
  table, prefix = _two_prompts()
  table = release(table, 0, 1)
  assert int(table.num_free) == 7
  table = _adopt(table, 2, prefix, 48)
  assert int(table.num_free) == 7
  table, ok, _ = append(table, 0, 0, 5)
  assert ok == [True] * 3
  assert int(table.num_free) == 6
  assert_valid(table)


def test_a_miss_takes_every_page_after_the_cache_drops_its_holds():
  table, prefix = _two_prompts()
  table = release(table, 0, 1)
  refused, ok, _ = append(table, 0, 0, 160)
  assert ok == [True, True, False]
  assert_same(refused, table)
  table, _ = change("drop", table, prefix)
  table, ok, _ = append(table, 0, 0, 160)
  assert ok == [True] * 3
  assert int(table.num_free) == 0
  assert_valid(table)


def test_without_caching_the_pool_is_used_up_and_the_next_is_refused():
  table = page_table.init(4, 8, 3, 4)
  table, _, _ = append(table, 20, 0, 0)
  assert len(pages(table, 0)) == 3
  table = release(table, 0)
  table, ok, _ = append(table, 0, 32, 0)
  assert ok == [True] * 3
  after, ok, _ = append(table, 0, 0, 1)
  assert ok == [True, True, False]
  assert_same(after, table)


def test_decode_growth_takes_a_page_only_at_a_boundary():
  table, _, _ = append(page_table.init(10, 16, 1, 10), 55)
  table, _, _ = append(table, 4)
  assert len(pages(table, 0)) == 4
  table, _, _ = append(table, 15)
  assert len(pages(table, 0)) == 5
  assert_valid(table)


def test_partial_page_copy_on_write():
  """A ends in the middle of a page; B continues it in a copy."""
  table, _, _ = append(page_table.init(6, 8, 2, 4), 12, 0)
  kept = pages(table, 0)
  table, _ = change("hold", table, kept)
  table = _adopt(release(table, 0), 1, kept, 12)
  table, ok, copies = append(table, 0, 4)
  assert ok == [True, True]
  tail = pages(table, 1)[1]
  assert tail != kept[1]
  assert copies == [(kept[1], tail)]
  assert [int(table.ref_counts[page]) for page in kept] == [2, 1]
  assert int(table.ref_counts[tail]) == 1
  table, _ = change("drop", table, kept[1:])
  assert int(table.ref_counts[kept[1]]) == 0
  assert_valid(table)


def test_fork_n_copies_only_the_last_page():
  """The parent has four pages, the last not full, and two children."""
  table, _, _ = append(page_table.init(16, 8, 3, 4), 28, 0, 0)
  parent = pages(table, 0)
  table, _ = change("fork", table, [0, 0], [1, 2])
  table, _, copies = append(table, 1, 1, 1)
  assert pages(table, 0) == parent
  assert [src for src, _ in copies] == [parent[3]] * 2
  for child in (1, 2):
    assert pages(table, child)[:3] == parent[:3]
  ends = {pages(table, row)[3] for row in range(3)}
  assert len(ends) == 3
  assert counts(table, 1) == [3, 3, 3, 1]
  assert_valid(table)


@pytest.mark.slow
def test_divergent_writes_never_show_in_siblings():
  table, _, _ = append(page_table.init(16, 8, 3, 4), 28, 0, 0)
  pool = kv_pool.init(16, 2, 1, 8, 8, jnp.float32)

  def write(table, pool, rows, positions, value):
    slots = page_table.slots(table, i32(*rows), i32(*positions))
    x = jnp.full((len(rows), 1, 8), value, jnp.float32)
    for layer in range(2):
      pool = kv_pool.write(pool, layer, x + layer, -x - layer, slots)
    return pool

  pool = write(table, pool, [0] * 28, range(28), 1.0)
  table, _ = change("fork", table, [0, 0], [1, 2])
  result = page_table.append(table, i32(1, 1, 1))
  pool = kv_pool.copy_pages(pool, result.copies.src, result.copies.dst)
  for row in range(3):
    pool = write(result.table, pool, [row], [28], 10.0 * (row + 1))
  for row in range(3):
    page = np.asarray(pages(result.table, row))
    k = np.asarray(pool.k[page, 1, 0, :, 0]).reshape(-1)
    expected = [2.0] * 28 + [10.0 * (row + 1) + 1]
    np.testing.assert_array_equal(k[:29], expected)


@pytest.mark.parametrize(
  # Pages are freed one token later than by a count from the next query, since
  # the last token may still be a query.
  ("computed", "freed"),
  [(16, 0), (20, 0), (24, 1), (31, 1), (32, 2), (48, 4)],
)
def test_window_release_of_window_16_with_pages_of_8(computed, freed):
  table, _, _ = append(page_table.init(8, 8, 1, 8), computed)
  table = jitted("release_outside_window")(table, 16)
  entries = np.asarray(table.page_indices[0])
  used = -(-computed // 8)
  assert (entries[:used] == 8).tolist() == [True] * freed + [False] * (
    used - freed
  )
  assert_valid(table)


@pytest.mark.slow
def test_window_hit_needs_the_last_window_only():
  table, _, _ = append(page_table.init(8, 8, 2, 11), 64, 0)
  cached = pages(table, 0)[6:]
  table, _ = change("hold", table, cached)
  table = release(table, 0)
  row = [8] * 6 + cached + [8] * 3
  table, ok = change("adopt", table, 1, row, 64, 6 * 8 + 16)
  assert ok
  assert table.page_indices[1].tolist() == row
  assert table.ref_counts[np.asarray(cached)].tolist() == [2, 2]
  assert_valid(table)
  _, ok = change("truncate", table, 1, 63)
  assert not ok
  table, ok, copies = append(table, 0, 1)
  assert ok == [True, True]
  assert copies == []
  assert_valid(table)


def test_a_prompt_that_can_never_fit_is_refused_on_an_empty_pool():
  table = page_table.init(4, 16, 1, 64)
  after, ok, _ = append(table, 256)
  assert ok == [False]
  assert_same(after, table)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prefill", "decode", "forked", "copied"])
def test_no_leak_when_sequences_end_at_any_stage(stage):
  table, _, _ = append(page_table.init(24, 8, 5, 4), *[10] * 5)
  if stage != "prefill":
    for _ in range(10):
      table, ok, _ = append(table, *[1] * 5)
      assert all(ok)
  if stage in ("forked", "copied"):
    table = release(table, 3, 4)
    table, _ = change("fork", table, [0, 0], [3, 4])
  if stage == "copied":
    table, _, copies = append(table, *[1] * 5)
    assert copies
  table = release(table, *range(5))
  assert int(table.num_free) == 24
  assert not table.ref_counts.any()
  assert (table.page_indices == 24).all()
  assert_valid(table)
