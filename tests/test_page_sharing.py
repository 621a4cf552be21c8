import jax.numpy as jnp
import pytest
from pages import (
  append,
  assert_row_unchanged,
  assert_same,
  assert_valid,
  change,
  counts,
  i32,
  pages,
  release,
)

from paged_jax import page_table

NOBODY = 4


def _table(num_pages=8, **options):
  return page_table.init(num_pages, 8, 4, 3, **options)


def _family(num_rows, num_tokens=12, num_pages=8):
  """Rows forked from row 0."""
  table, ok, _ = append(_table(num_pages), num_tokens, 0, 0, 0)
  assert ok[0]
  children = range(1, num_rows)
  table, ok = change("fork", table, [0] * (num_rows - 1), list(children))
  assert all(ok)
  return table


def test_a_fork_shares_every_page_and_takes_none():
  table = _family(3)
  assert pages(table, 0) == pages(table, 1) == pages(table, 2)
  assert counts(table, 0) == [3, 3]
  assert int(table.num_free) == 6
  assert_valid(table)


def test_the_first_writer_keeps_the_page_and_the_others_copy():
  before = _family(3)
  table, ok, copies = append(before, 1, 1, 1, 0)
  assert ok == [True] * 4
  shared, last = pages(before, 0)
  assert pages(table, 0) == [shared, last]
  assert copies == [(last, pages(table, 1)[1]), (last, pages(table, 2)[1])]
  assert counts(table, 0) == [3, 1]
  assert counts(table, 1) == counts(table, 2) == [3, 1]
  assert_valid(table)


def test_the_first_in_order_keeps_the_page():
  before = _family(3)
  table, _, copies = append(before, 1, 1, 1, 0, order=[2, 1, 0, 3])
  assert pages(table, 2) == pages(before, 2)
  assert len(copies) == 2
  assert_valid(table)


def test_all_writers_copy_while_somebody_else_names_the_page():
  before = _family(3)
  table, ok, copies = append(before, 0, 1, 1, 0)
  assert ok == [True] * 4
  assert len(copies) == 2
  assert pages(table, 0) == pages(before, 0)
  assert counts(table, 0) == [3, 1]
  # Now it is alone with its page, and writes in place.
  table, _, copies = append(table, 1, 0, 0, 0)
  assert copies == []
  assert_valid(table)


def test_a_held_page_is_never_written():
  before, ok = change("hold", _family(1), pages(_family(1), 0))
  assert ok == [True, True]
  table, _, copies = append(before, 1, 0, 0, 0)
  assert [src for src, _ in copies] == pages(before, 0)[1:]
  assert pages(table, 0) != pages(before, 0)
  assert_valid(table)


def test_a_full_last_page_needs_no_copy():
  table, ok, copies = append(_family(3, num_tokens=16), 1, 1, 1, 0)
  assert ok == [True] * 4
  assert copies == []
  assert counts(table, 1) == [3, 3, 1]
  assert_valid(table)


def test_a_pool_short_by_one_refuses_the_row_whose_copy_does_not_fit():
  before = _family(3, num_pages=3)  # one free page, two copies to make
  table, ok, copies = append(before, 1, 1, 1, 0)
  # Row 0 moves away; row 1 finds no page; row 2 is not alone then.
  assert ok == [True, False, False, True]
  assert len(copies) == 1
  for row in (1, 2):
    assert_row_unchanged(before, table, row)
  assert counts(table, 1) == [3, 2]
  assert_valid(table)


def test_a_copy_and_new_pages_come_together_or_not_at_all():
  before = _family(2, num_pages=3)
  refused, ok, copies = append(before, 0, 5, 0, 0)  # a copy and a page
  assert ok == [True, False, True, True]
  assert copies == []
  assert_same(refused, before)
  table, ok, copies = append(_family(2, num_pages=4), 0, 5, 0, 0)
  assert ok == [True] * 4
  assert copies == [(pages(table, 0)[1], pages(table, 1)[1])]
  assert len(pages(table, 1)) == 3
  assert_valid(table)


def test_the_last_writer_is_refused_when_its_page_does_not_become_its_own():
  # Row 0 asks for three pages of one, so row 1 does not get its copy; row 2
  # would need none if row 1 moved away.
  table = _table(num_pages=3)
  table, _, _ = append(table, 0, 12, 0, 0)
  table, _ = change("fork", table, 1, 2)
  after, ok, copies = append(table, 24, 1, 1, 0)
  assert ok == [False, False, False, True]
  assert copies == []
  assert_same(after, table)


def test_order_decides_who_is_served():
  table = _table(num_pages=2)
  _, ok, _ = append(table, 8, 8, 8, 0)
  assert ok == [True, True, False, True]
  after, ok, _ = append(table, 8, 8, 8, 0, order=[2, 0, 1, 3])
  assert ok == [True, False, True, True]
  assert_valid(after)


@pytest.mark.parametrize(
  "order", [[1, 1, 1, 1], [9, -1, -4, 4], [2**31 - 1, 1, -(2**31), 0]]
)
def test_an_order_that_is_none_never_hands_out_a_page_twice(order):
  table, ok, _ = append(_table(num_pages=4), 8, 8, 8, 8, order=order)
  assert ok == [True] * 4
  assert_valid(table)


def test_a_bound_on_new_tokens_refuses_more_and_changes_nothing_else():
  table = _family(3)
  num_new = i32(1, 1, 0, 5)
  bounded = page_table.append(table, num_new, max_new_tokens=1)
  assert bounded.ok.tolist() == [True, True, True, False]
  free = page_table.append(table, num_new.at[3].set(0))
  assert_same(bounded.table, free.table)
  assert_same(bounded.copies, free.copies)


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
  table, _, _ = append(_table(), 9, 3, 0, 0)
  after, ok = change("fork", table, src, dst)
  assert ok is expected
  assert_same(after, table)


def test_a_row_named_twice_is_filled_by_the_first_fork():
  before, _, _ = append(_table(), 9, 3, 0, 0)
  table, ok = change("fork", before, [1, 0, 1], [2, 2, 3])
  assert ok == [True, False, True]
  assert pages(table, 2) == pages(table, 3) == pages(before, 1)
  assert_valid(table)


def test_a_fork_of_a_row_filled_in_the_same_call_finds_it_empty():
  before, _, _ = append(_table(), 9, 3, 0, 0)
  table, ok = change("fork", before, [0, 2], [2, 3])
  assert ok == [True, True]
  assert table.kv_lens.tolist() == [9, 3, 9, 0]
  assert_valid(table)


def test_a_permutation_reorders_beams_without_moving_a_page():
  before, _, _ = append(_table(), 9, 3, 24, 0)
  table, ok = change("permute", before, [2, 2, NOBODY, 0])
  assert ok is True
  assert pages(table, 0) == pages(table, 1) == pages(before, 2)
  assert pages(table, 3) == pages(before, 0)
  assert table.kv_lens.tolist() == [24, 24, 0, 9]
  assert int(table.num_free) == int(before.num_free) + 1
  assert_valid(table)


@pytest.mark.parametrize("parents", [[0, 1, 2, 3], [0, 1, 2, 5], [0, -1, 2, 3]])
def test_the_identity_and_bad_parents_change_nothing(parents):
  table, _, _ = append(_table(), 9, 3, 24, 0)
  after, ok = change("permute", table, parents)
  assert ok is (parents == [0, 1, 2, 3])
  assert_same(after, table)


def test_held_pages_outlive_their_row_until_they_are_dropped():
  table, _, _ = append(_table(), 16, 0, 0, 0)
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
  table, _, _ = append(_table(), 8, 0, 0, 0)
  (used,) = pages(table, 0)
  free = (used + 1) % 8
  after, ok = change("hold", table, [free, -1, 9, 8])
  assert ok == [False, False, False, True]
  assert_same(after, table)
  after, ok = change("drop", table, [used, free, -1, 9, 8])
  assert ok == [False, False, False, False, True]
  assert_same(after, table)


def test_a_hold_dropped_twice_in_one_call_goes_once():
  table, _, _ = append(_table(), 8, 0, 0, 0)
  (used,) = pages(table, 0)
  table, _ = change("hold", table, [used])
  table, ok = change("drop", table, [used, used])
  assert ok == [True, False]
  assert counts(table, 0) == [1]
  assert_valid(table)


def test_adopt_refuses_what_is_not_a_prefix_in_use():
  table, _, _ = append(_table(), 16, 0, 0, 0)
  a, b = pages(table, 0)
  free = next(page for page in range(8) if page not in (a, b))
  for seq, entries, kv_len in (
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
  ):
    after, ok = change("adopt", table, seq, entries, kv_len)
    assert ok is False, (seq, entries, kv_len)
    assert_same(after, table)


def test_rows_adopt_in_one_call_and_write_to_copies_only():
  before, _, _ = append(_table(), 16, 0, 0, 0)
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


def test_a_quota_short_by_one_refuses_append():
  table = _table(tenants=[0, 0, 1, 0], quotas=[2, page_table.NO_QUOTA])
  before, _, _ = append(table, 4, 0, 0, 0)
  # Row 0 asks for two pages of the one left: row 3 is blocked, row 1 needs
  # nothing, row 2 is somebody else's.
  after, ok, _ = append(before, 13, 0, 24, 1)
  assert ok == [False, True, True, False]
  for row in (0, 3):
    assert_row_unchanged(before, after, row)
  assert page_table.tenant_pages(after).tolist() == [1, 3]
  after, ok, _ = append(before, 12, 0, 24, 0)
  assert ok == [True] * 4
  assert_valid(after)


def test_a_copy_does_not_count_against_a_quota():
  table, _, _ = append(_table(quotas=[4]), 12, 0, 0, 0)
  table, _ = change("fork", table, 0, 1)
  table, ok, copies = append(table, 1, 1, 0, 0)
  assert ok == [True] * 4
  assert len(copies) == 1
  assert page_table.tenant_pages(table).tolist() == [4]


def test_a_quota_short_by_one_refuses_fork_adopt_and_permute():
  table, _, _ = append(_table(tenants=[0, 1, 1, 1], quotas=[9, 3]), 16, 0, 0, 0)
  after, ok = change("fork", table, [0, 0], [1, 2])
  assert ok == [True, False]
  assert_row_unchanged(table, after, 2)
  assert_valid(after)
  a, b = pages(table, 0)
  again, ok = change("adopt", table, [1, 2], [[a, b, 8]] * 2, [16, 16])
  assert ok == [True, False]
  assert_same(again, after)
  after, ok = change("permute", table, [0, 0, 0, NOBODY])
  assert ok is False
  assert_same(after, table)
  after, ok = change("permute", table, [NOBODY, 0, NOBODY, NOBODY])
  assert ok is True
  assert_valid(after)


def test_only_an_empty_row_changes_its_tenant():
  table, _, _ = append(_table(quotas=[8, 1]), 1, 0, 0, 0)
  before = table
  table, ok = change("assign", table, [0, 1, 1, 2, 5, 4], [1, 1, 0, 2, 0, 0])
  assert ok == [False, True, False, False, False, True]
  assert table.tenants.tolist() == [0, 1, 0, 0]
  assert_row_unchanged(before, table, 0)
  _, ok, _ = append(table, 0, 9, 0, 0)
  assert ok == [True, False, True, True]


def _storm(num_free, num_tokens):
  """64 rows forked from one, on a pool with `num_free` free pages."""
  used = -(-num_tokens // 8)
  table = page_table.init(num_free + used, 8, 64, 4)
  table, _, _ = append(table, num_tokens, *[0] * 63)
  table, ok = change("fork", table, [0] * 63, list(range(1, 64)))
  assert all(ok)
  assert int(table.num_free) == num_free
  return table


@pytest.mark.parametrize("num_free", [63, 64, 65])
def test_a_storm_of_64_forks_diverges_with_63_copies(num_free):
  before = _storm(num_free, 12)
  table, ok, copies = append(before, *[1] * 64)
  assert all(ok)
  last = pages(before, 0)[1]
  assert [src for src, _ in copies] == [last] * 63
  assert pages(table, 0) == pages(before, 0)
  ends = [pages(table, row)[1] for row in range(64)]
  assert len(set(ends)) == 64
  assert int(table.num_free) == num_free - 63
  assert_valid(table)


def test_a_storm_on_62_pages_refuses_two_rows():
  before = _storm(62, 12)
  table, ok, copies = append(before, *[1] * 64)
  # Row 62 finds no page for its copy, so that row 63 is not alone.
  assert ok == [True] * 62 + [False] * 2
  assert len(copies) == 62
  for row in (62, 63):
    assert_row_unchanged(before, table, row)
  assert counts(table, 63) == [64, 2]
  assert int(table.num_free) == 0
  assert_valid(table)


@pytest.mark.parametrize(("num_free", "served"), [(63, 63), (64, 64), (65, 64)])
def test_a_storm_at_a_page_boundary_takes_a_page_each(num_free, served):
  before = _storm(num_free, 16)
  table, ok, copies = append(before, *[1] * 64)
  assert sum(ok) == served
  assert ok == sorted(ok, reverse=True)
  assert copies == []
  assert_valid(table)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named():
  table = _table()
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
  with pytest.raises(ValueError, match="pages"):
    page_table.hold(table, i32(0, 1).reshape(1, 2))
  with pytest.raises(ValueError, match="pages"):
    page_table.drop(table, jnp.zeros(2))
  with pytest.raises(ValueError, match="tenant"):
    page_table.assign(table, i32(0, 1), i32(0))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(quotas=[-1]), "quotas"),
    (dict(quotas=[2**31]), "quotas"),
    (dict(tenants=[0, 0]), "tenants"),
    (dict(tenants=[0, 0, 0, 1]), "tenants"),
    (dict(tenants=[0, 0, 0, -1], quotas=[1]), "tenants"),
  ],
)
def test_tenants_and_quotas_out_of_range_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    _table(**options)
