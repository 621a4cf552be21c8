import jax.numpy as jnp
import pytest
from pages import (
  append,
  assert_same,
  assert_valid,
  change,
  counts,
  family,
  i32,
  new_table,
  pages,
  release,
)

from paged_jax import page_table

NOBODY = 4


def test_a_fork_shares_every_page_and_takes_none():
  table = family(3)
  assert pages(table, 0) == pages(table, 1) == pages(table, 2)
  assert counts(table, 0) == [3, 3]
  assert int(table.num_free) == 6
  assert_valid(table)


@pytest.mark.parametrize(
  ("src", "dst", "expected"),
  [
    (0, 0, False),  # onto itself
    (0, 1, False),  # onto a live row
    (2, 2, True),  # an empty row, onto itself
    (2, 3, True),  # from an empty row
    (0, NOBODY, True),  # nothing to do
    (NOBODY, 2, True),
    (0, NOBODY + 1, False),
    (0, -1, False),
    (-1, 2, False),
    (NOBODY + 1, 2, False),
  ],
)
def test_forks_that_change_nothing(src, dst, expected):
  table, _, _ = append(new_table(), 9, 3, 0, 0)
  after, ok = change("fork", table, src, dst)
  assert ok is expected
  assert_same(after, table)


def test_a_row_named_twice_is_filled_by_the_first_fork():
  before, _, _ = append(new_table(), 9, 3, 0, 0)
  table, ok = change("fork", before, [1, 0, 1], [2, 2, 3])
  assert ok == [True, False, True]
  assert pages(table, 2) == pages(table, 3) == pages(before, 1)
  assert_valid(table)


def test_a_fork_of_a_row_filled_in_the_same_call_finds_it_empty():
  before, _, _ = append(new_table(), 9, 3, 0, 0)
  table, ok = change("fork", before, [0, 2], [2, 3])
  assert ok == [True, True]
  assert table.kv_lens.tolist() == [9, 3, 9, 0]
  assert_valid(table)


def test_a_permutation_reorders_beams_without_moving_a_page():
  before, _, _ = append(new_table(), 9, 3, 24, 0)
  table, ok = change("permute", before, [2, 2, NOBODY, 0])
  assert ok is True
  assert pages(table, 0) == pages(table, 1) == pages(before, 2)
  assert pages(table, 3) == pages(before, 0)
  assert table.kv_lens.tolist() == [24, 24, 0, 9]
  assert int(table.num_free) == int(before.num_free) + 1
  assert_valid(table)


@pytest.mark.parametrize("parents", [[0, 1, 2, 3], [0, 1, 2, 5], [0, -1, 2, 3]])
def test_the_identity_and_bad_parents_change_nothing(parents):
  table, _, _ = append(new_table(), 9, 3, 24, 0)
  after, ok = change("permute", table, parents)
  assert ok is (parents == [0, 1, 2, 3])
  assert_same(after, table)


def test_held_pages_outlive_their_row_until_they_are_dropped():
  table, _, _ = append(new_table(), 16, 0, 0, 0)
  held = pages(table, 0)
  table, ok = change("hold", table, [*held, held[0]])
  assert ok == [True] * 3
  table = release(table, 0)
  assert int(table.num_free) == 6
  table, ok = change("adopt", table, 2, [*held, 8], 16)
  assert ok is True
  table = release(table, 2)
  table, ok = change("drop", table, [held[0], held[1], held[1], 8])
  assert ok == [True, True, False, True]
  assert int(table.num_free) == 7
  table, ok = change("drop", table, [held[0]])
  assert ok == [True]
  assert int(table.num_free) == 8
  assert_valid(table)


def test_holding_a_free_page_and_dropping_one_without_holds_is_refused():
  table, _, _ = append(new_table(), 8, 0, 0, 0)
  (used,) = pages(table, 0)
  free = (used + 1) % 8
  after, ok = change("hold", table, [free, -1, 9, 8])
  assert ok == [False, False, False, True]
  assert_same(after, table)
  after, ok = change("drop", table, [used, free, -1, 9, 8])
  assert ok == [False, False, False, False, True]
  assert_same(after, table)


def test_a_hold_dropped_twice_in_one_call_goes_once():
  table, _, _ = append(new_table(), 8, 0, 0, 0)
  (used,) = pages(table, 0)
  table, _ = change("hold", table, [used])
  table, ok = change("drop", table, [used, used])
  assert ok == [True, False]
  assert counts(table, 0) == [1]
  assert_valid(table)


def test_adopt_refuses_what_is_not_a_prefix_in_use():
  table, _, _ = append(new_table(), 16, 0, 0, 0)
  a, b = pages(table, 0)
  free = next(page for page in range(8) if page not in (a, b))
  for request in (
    (0, [a, b, 8], 16),  # a live row
    (5, [a, b, 8], 16),
    (-1, [a, b, 8], 16),
    (1, [a, b, 8], 17),  # more tokens than the pages hold
    (1, [a, b, 8], 8),  # more pages than the tokens need
    (1, [a, 8, 8], 16),
    (1, [a, a, 8], 16),  # a page twice
    (1, [a, free, 8], 16),
    (1, [a, -1, 8], 16),
    (1, [a, 9, 8], 16),
    (1, [a, b, 8], -1),
    (1, [a, b, 8], 2**31 - 1),
    (1, [8, b, 8], 16),
    (1, [8, b, 8], 16, 8),  # a hole that ends too late, at min_lens
    (1, [a, 8, 8], 16, 16),
    (1, [a, b, 8], 16, 17),
    (1, [a, b, 8], 16, -1),
  ):
    after, ok = change("adopt", table, *request)
    assert ok is False, request
    assert_same(after, table)


def test_rows_adopt_in_one_call_and_write_to_copies_only():
  before, _, _ = append(new_table(), 16, 0, 0, 0)
  a, b = pages(before, 0)
  table, ok = change(
    "adopt", before, [1, 3, 1], [[a, b, 8], [a, 8, 8], [a, 8, 8]], [12, 8, 8]
  )
  assert ok == [True, True, False]
  assert table.kv_lens.tolist() == [16, 12, 0, 8]
  assert table.ref_counts[a] == 3
  table, _, copies = append(table, 0, 1, 0, 1)
  assert [src for src, _ in copies] == [b]
  assert_valid(table)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named():
  table = new_table()
  with pytest.raises(ValueError, match="order"):
    page_table.append(table, i32(0, 0, 0, 0), order=i32(0, 1))
  with pytest.raises(ValueError, match="max_new_tokens=0"):
    page_table.append(table, i32(0, 0, 0, 0), max_new_tokens=0)
  with pytest.raises(ValueError, match="dst"):
    page_table.fork(table, i32(0, 1), i32(2))
  with pytest.raises(ValueError, match="src"):
    page_table.fork(table, jnp.zeros(1), i32(2))
  with pytest.raises(ValueError, match="parents"):
    page_table.permute(table, i32(0, 1))
  with pytest.raises(ValueError, match="pages"):
    page_table.adopt(table, 0, i32(0, 1), 8)
  with pytest.raises(ValueError, match="min_len"):
    page_table.adopt(table, 0, i32(0, 1, 8), 8, i32(0, 1))
  with pytest.raises(ValueError, match="pages"):
    page_table.hold(table, i32(0, 1).reshape(1, 2))
  with pytest.raises(ValueError, match="pages"):
    page_table.drop(table, jnp.zeros(2))
  with pytest.raises(ValueError, match="tenant"):
    page_table.assign(table, i32(0, 1), i32(0))
