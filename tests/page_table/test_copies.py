import pytest
from pages import (
  append,
  assert_row_unchanged,
  assert_same,
  assert_valid,
  change,
  counts,
  family,
  i32,
  new_table,
  pages,
)

from paged_jax import page_table


def test_the_first_writer_keeps_the_page_and_the_others_copy():
  before = family(3)
  table, ok, copies = append(before, 1, 1, 1, 0)
  assert ok == [True] * 4
  shared, last = pages(before, 0)
  assert pages(table, 0) == [shared, last]
  assert copies == [(last, pages(table, 1)[1]), (last, pages(table, 2)[1])]
  assert counts(table, 0) == [3, 1]
  assert counts(table, 1) == counts(table, 2) == [3, 1]
  assert_valid(table)


def test_the_first_in_order_keeps_the_page():
  before = family(3)
  table, _, copies = append(before, 1, 1, 1, 0, order=[2, 1, 0, 3])
  assert pages(table, 2) == pages(before, 2)
  assert len(copies) == 2
  assert_valid(table)


def test_all_writers_copy_while_somebody_else_names_the_page():
  before = family(3)
  table, ok, copies = append(before, 0, 1, 1, 0)
  assert ok == [True] * 4
  assert len(copies) == 2
  assert pages(table, 0) == pages(before, 0)
  assert counts(table, 0) == [3, 1]
  # Now no other row names its page, and it writes in place.
  table, _, copies = append(table, 1, 0, 0, 0)
  assert copies == []
  assert_valid(table)


def test_a_held_page_is_never_written():
  before, ok = change("hold", family(1), pages(family(1), 0))
  assert ok == [True, True]
  table, _, copies = append(before, 1, 0, 0, 0)
  assert [src for src, _ in copies] == pages(before, 0)[1:]
  assert pages(table, 0) != pages(before, 0)
  assert_valid(table)


def test_a_full_last_page_needs_no_copy():
  table, ok, copies = append(family(3, num_tokens=16), 1, 1, 1, 0)
  assert ok == [True] * 4
  assert copies == []
  assert counts(table, 1) == [3, 3, 1]
  assert_valid(table)


def test_a_pool_short_by_one_refuses_the_row_whose_copy_does_not_fit():
  before = family(3, num_pages=3)  # one free page, two copies to make
  table, ok, copies = append(before, 1, 1, 1, 0)
  # Row 0 copies; row 1 finds no page, so row 2 still shares with it.
  assert ok == [True, False, False, True]
  assert len(copies) == 1
  for row in (1, 2):
    assert_row_unchanged(before, table, row)
  assert counts(table, 1) == [3, 2]
  assert_valid(table)


def test_a_copy_and_new_pages_come_together_or_not_at_all():
  before = family(2, num_pages=3)
  refused, ok, copies = append(before, 0, 5, 0, 0)  # a copy and a page
  assert ok == [True, False, True, True]
  assert copies == []
  assert_same(refused, before)
  table, ok, copies = append(family(2, num_pages=4), 0, 5, 0, 0)
  assert ok == [True] * 4
  assert copies == [(pages(table, 0)[1], pages(table, 1)[1])]
  assert len(pages(table, 1)) == 3
  assert_valid(table)


def test_the_last_writer_is_refused_when_its_page_does_not_become_its_own():
  # Row 0 requests three pages and one is free, so row 1 does not get its copy;
  # row 2 would need none if row 1 copied.
  table = new_table(num_pages=3)
  table, _, _ = append(table, 0, 12, 0, 0)
  table, _ = change("fork", table, 1, 2)
  after, ok, copies = append(table, 24, 1, 1, 0)
  assert ok == [False, False, False, True]
  assert copies == []
  assert_same(after, table)


def test_order_decides_who_is_served():
  table = new_table(num_pages=2)
  _, ok, _ = append(table, 8, 8, 8, 0)
  assert ok == [True, True, False, True]
  after, ok, _ = append(table, 8, 8, 8, 0, order=[2, 0, 1, 3])
  assert ok == [True, False, True, True]
  assert_valid(after)


@pytest.mark.parametrize(
  "order", [[1, 1, 1, 1], [9, -1, -4, 4], [2**31 - 1, 1, -(2**31), 0]]
)
def test_an_invalid_order_never_hands_out_a_page_twice(order):
  table, ok, _ = append(new_table(num_pages=4), 8, 8, 8, 8, order=order)
  assert ok == [True] * 4
  assert_valid(table)


@pytest.mark.slow
def test_a_bound_on_new_tokens_refuses_more_and_changes_nothing_else():
  table = family(3)
  num_new = i32(1, 1, 0, 5)
  bounded = page_table.append(table, num_new, max_new_tokens=1)
  assert bounded.ok.tolist() == [True, True, True, False]
  free = page_table.append(table, num_new.at[3].set(0))
  assert_same(bounded.table, free.table)
  assert_same(bounded.copies, free.copies)


def _fork_64_times(num_free, num_tokens):
  """Returns 64 rows with one row's pages, and `num_free` free pages."""
  used = -(-num_tokens // 8)
  table = page_table.init(num_free + used, 8, 64, 4)
  table, _, _ = append(table, num_tokens, *[0] * 63)
  table, ok = change("fork", table, [0] * 63, list(range(1, 64)))
  assert all(ok)
  assert int(table.num_free) == num_free
  return table


@pytest.mark.slow
@pytest.mark.parametrize("num_free", [63, 64, 65])
def test_64_forks_diverge_with_63_copies(num_free):
  before = _fork_64_times(num_free, 12)
  table, ok, copies = append(before, *[1] * 64)
  assert all(ok)
  last = pages(before, 0)[1]
  assert [src for src, _ in copies] == [last] * 63
  assert pages(table, 0) == pages(before, 0)
  ends = [pages(table, row)[1] for row in range(64)]
  assert len(set(ends)) == 64
  assert int(table.num_free) == num_free - 63
  assert_valid(table)


@pytest.mark.slow
def test_64_forks_on_62_pages_refuse_two_rows():
  before = _fork_64_times(62, 12)
  table, ok, copies = append(before, *[1] * 64)
  # Row 62 finds no page for its copy, so row 63 still shares its page.
  assert ok == [True] * 62 + [False] * 2
  assert len(copies) == 62
  for row in (62, 63):
    assert_row_unchanged(before, table, row)
  assert counts(table, 63) == [64, 2]
  assert int(table.num_free) == 0
  assert_valid(table)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("num_free", "served"), [(63, 63), (64, 64), (65, 64)])
def test_64_forks_at_a_page_boundary_take_a_page_each(num_free, served):
  before = _fork_64_times(num_free, 16)
  table, ok, copies = append(before, *[1] * 64)
  assert sum(ok) == served
  assert ok == sorted(ok, reverse=True)
  assert copies == []
  assert_valid(table)
