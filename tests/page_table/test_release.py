import jax.numpy as jnp
import numpy as np
import pytest
from pages import (
  append,
  assert_row_unchanged,
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

HOLE = 12


def _table(**options):
  return page_table.init(HOLE, 8, 3, 8, **options)


def _leave(table, window, sinks=0):
  return jitted("release_outside_window")(table, i32(window)[0], i32(sinks)[0])


def test_truncate_gives_back_the_pages_past_the_new_length():
  before, _, _ = append(_table(), 30, 17, 0)
  table, ok = change("truncate", before, [0, 1], [8, 17])
  assert ok == [True, True]
  assert table.kv_lens.tolist() == [8, 17, 0]
  assert pages(table, 0) == pages(before, 0)[:1]
  assert int(table.num_free) == int(before.num_free) + 3
  assert_row_unchanged(before, table, 1)
  assert_valid(table)


@pytest.mark.parametrize("new_len", [0, 1, 7, 8, 9, 16, 17, 23, 24])
def test_an_append_is_undone_by_truncate(new_len):
  before, _, _ = append(_table(), new_len, 5, 0)
  longer, _, _ = append(before, 24 - new_len, 0, 0)
  table, ok = change("truncate", longer, 0, new_len)
  assert ok is True
  for row in range(3):
    assert_row_unchanged(before, table, row)
  assert_same(table.ref_counts, before.ref_counts)
  assert int(table.num_free) == int(before.num_free)
  assert_valid(table)


def test_truncate_never_frees_a_page_that_another_row_names():
  table, _, _ = append(_table(), 24, 0, 0)
  table, _ = change("fork", table, 0, 1)
  table, ok = change("truncate", table, 0, 1)
  assert ok is True
  assert int(table.num_free) == HOLE - 3
  assert counts(table, 1) == [2, 1, 1]
  # Both rows drop the same two pages in one call: they are freed once.
  table, ok = change("truncate", table, [1, 0], [8, 0])
  assert ok == [True, True]
  assert int(table.num_free) == HOLE - 1
  assert_valid(table)


def test_truncations_that_are_refused_change_nothing():
  table, _, _ = append(_table(), 24, 9, 0)
  for seq, new_len, expected in (
    (0, 25, False),
    (0, -1, False),
    (0, 2**31 - 1, False),
    (0, -(2**31), False),
    (-1, 0, False),
    (4, 0, False),
    (3, 0, True),  # nothing to do
    (2, 0, True),
    (0, 24, True),
  ):
    after, ok = change("truncate", table, seq, new_len)
    assert ok is expected, (seq, new_len)
    assert_same(after, table)


def test_the_first_of_two_truncations_of_a_row_counts():
  table, _, _ = append(_table(), 24, 9, 0)
  table, ok = change("truncate", table, [0, 0], [16, 8])
  assert ok == [True, False]
  assert table.kv_lens.tolist() == [16, 9, 0]


def test_a_window_of_16_leaves_one_page_every_eight_tokens():
  table = _table()
  for length in range(1, 65):
    table, ok, _ = append(table, 1, 0, 0)
    assert ok[0]
    table = _leave(table, 16)
    entries = np.asarray(table.page_indices[0])
    left = max(length - 16, 0) // 8
    assert (entries[:left] == HOLE).all()
    assert (entries[left : -(-length // 8)] != HOLE).all()
    assert_valid(table)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("window", "sinks"), [(1, 0), (9, 0), (16, 4), (20, 9)]
)
def test_a_windowed_row_holds_a_bounded_number_of_pages(window, sinks):
  bound = -(-window // 8) + 1 + -(-sinks // 8)
  table = page_table.init(bound, 8, 1, 64)
  for _ in range(512):
    table, ok, _ = append(table, 1)
    assert ok == [True]
    table = _leave(table, window, sinks)
  assert table.kv_lens.tolist() == [512]
  assert_valid(table)


def test_pages_with_a_sink_token_stay():
  table, _, _ = append(_table(), 60, 0, 0)
  table = _leave(table, 8, 9)
  entries = np.asarray(table.page_indices[0])
  assert (entries != HOLE).tolist() == [True] * 2 + [False] * 4 + [True] * 2


def test_a_page_left_by_one_row_stays_with_the_others():
  table, _, _ = append(_table(), 40, 0, 0)
  table, _ = change("fork", table, 0, 1)
  table, _, _ = append(table, 8, 0, 0)
  table = _leave(table, 40)
  assert int(table.num_free) == HOLE - 6
  assert counts(table, 1) == [1, 2, 2, 2, 2]
  assert_valid(table)


def test_a_window_that_covers_everything_changes_nothing():
  table, _, _ = append(_table(), 60, 17, 0)
  assert_same(_leave(table, 60), table)
  assert_same(_leave(table, 2**31 - 1), table)
  once = _leave(table, 10)
  assert_same(_leave(once, 10), once)


def test_a_row_is_not_cut_to_where_its_window_is_not_whole():
  table, _, _ = append(_table(), 60, 0, 0)
  table = _leave(table, 16)  # 40 tokens are gone; at 56 the window is whole
  for new_len in (0, 39, 40, 55):
    after, ok = change("truncate", table, 0, new_len)
    assert ok is False
    assert_same(after, table)
  table, ok = change("truncate", table, 0, 56)
  assert ok is True
  # All keys that a query at the last or the next position sees are mapped.
  kept = np.asarray(
    page_table.slots(table, i32(*[0] * 16), i32(*range(40, 56)))
  )
  assert (kept < HOLE * 8).all()
  assert_valid(table)
  assert release(table, 0).min_lens.tolist() == [0, 0, 0]


def test_holes_have_no_slots_and_rows_grow_above_them():
  table, _, _ = append(_table(), 60, 0, 0)
  table = _leave(table, 16)
  table, ok, _ = append(table, 4, 0, 0)
  assert ok[0]
  positions = jnp.arange(64, dtype=jnp.int32)
  slots = page_table.slots(table, jnp.zeros_like(positions), positions)
  assert (np.asarray(slots) == HOLE * 8).tolist() == [True] * 40 + [False] * 24
  # Forks have the same holes.
  table, _ = change("fork", table, 0, 2)
  _, ok = change("truncate", table, 2, 40)
  assert ok is False
  assert_valid(table)


def test_freed_pages_are_those_that_became_free():
  before, _, _ = append(_table(), 24, 9, 0)
  before, _ = change("fork", before, 1, 2)
  after = release(before, 0, 1)
  freed = page_table.freed_pages(before, after, 5).tolist()
  assert freed == [*sorted(pages(before, 0)), HOLE, HOLE]
  with pytest.raises(ValueError, match="has 12 pages"):
    page_table.freed_pages(before, page_table.init(4, 8, 1, 1), 5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named():
  table = _table()
  with pytest.raises(ValueError, match="window=0"):
    page_table.release_outside_window(table, 0)
  with pytest.raises(ValueError, match="num_sink_tokens=-1"):
    page_table.release_outside_window(table, 8, -1)
  with pytest.raises(ValueError, match="window"):
    page_table.release_outside_window(table, i32(1, 2))
  with pytest.raises(ValueError, match="new_len"):
    page_table.truncate(table, i32(0, 1), i32(0))
