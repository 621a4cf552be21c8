import pytest
from pages import (
  append,
  assert_row_unchanged,
  assert_same,
  assert_valid,
  change,
  pages,
)

from paged_jax import page_table

NOBODY = 4


def _table(num_pages=8, **options):
  return page_table.init(num_pages, 8, 4, 3, **options)


def test_a_quota_short_by_one_refuses_append():
  table = _table(tenants=[0, 0, 1, 0], quotas=[2, page_table.NO_QUOTA])
  before, _, _ = append(table, 4, 0, 0, 0)
  # Row 0 requests two pages and one is left, which blocks row 3. Row 1 needs
  # none, and row 2 belongs to another tenant.
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
