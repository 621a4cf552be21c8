import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import page_table


def _append(table, *num_new_tokens):
  result = page_table.append(table, jnp.asarray(num_new_tokens, jnp.int32))
  return result.table, result.ok.tolist()


def _release(table, *rows):
  mask = np.zeros(table.num_seqs, bool)
  mask[list(rows)] = True
  return page_table.release(table, jnp.asarray(mask))


def _pages(table, row):
  """Returns the pages that a row names; checks that nothing follows them."""
  pages = np.asarray(table.page_indices[row])
  used = -(-int(table.kv_lens[row]) // table.page_size)
  assert (pages[used:] == table.num_pages).all()
  return pages[:used].tolist()


def _check_conservation(table):
  """Asserts that each page is free once, or named as often as it is counted."""
  free = np.asarray(table.free_pages)[: int(table.num_free)].tolist()
  named = [p for row in range(table.num_seqs) for p in _pages(table, row)]
  counts = np.bincount(named, minlength=table.num_pages)
  np.testing.assert_array_equal(counts, np.asarray(table.ref_counts))
  assert sorted(free + sorted(set(named))) == list(range(table.num_pages))


def _assert_equal(a, b):
  chex.assert_trees_all_equal(a, b)


def test_an_empty_table_names_nothing_and_every_page_is_free():
  table = page_table.init(5, 8, 3, 2)
  assert table.max_len == 16
  assert (np.asarray(table.page_indices) == 5).all()
  assert not np.asarray(table.kv_lens).any()
  assert int(table.num_free) == 5
  _check_conservation(table)


def test_append_takes_a_page_only_at_a_page_boundary():
  table = page_table.init(8, 8, 2, 4)
  table, ok = _append(table, 7, 0)
  assert ok == [True, True]
  before = _pages(table, 0)
  assert len(before) == 1
  table, _ = _append(table, 1, 0)
  assert _pages(table, 0) == before
  table, _ = _append(table, 1, 0)
  assert _pages(table, 0)[:1] == before
  assert len(_pages(table, 0)) == 2
  assert table.kv_lens.tolist() == [9, 0]
  _check_conservation(table)


def test_append_serves_all_rows_with_distinct_pages():
  table = page_table.init(10, 8, 4, 4)
  table, ok = _append(table, 20, 8, 0, 9)
  assert ok == [True] * 4
  assert [len(_pages(table, row)) for row in range(4)] == [3, 1, 0, 2]
  assert int(table.num_free) == 4
  _check_conservation(table)


@pytest.mark.slow
def test_page_zero_is_an_ordinary_page():
  table = page_table.init(1, 8, 1, 1)
  table, ok = _append(table, 8)
  assert ok == [True]
  assert _pages(table, 0) == [0]
  table = _release(table, 0)
  assert int(table.num_free) == 1


def test_rows_are_served_in_order_until_the_first_that_does_not_fit():
  table = page_table.init(5, 8, 5, 4)
  table, _ = _append(table, 0, 0, 0, 4, 0)  # row 3 has space in its last page
  before = table
  # Rows need 2, 3, 1, 0 and 1 pages; 4 are free.
  table, ok = _append(table, 16, 24, 8, 4, 8)
  assert ok == [True, False, False, True, False]
  assert table.kv_lens.tolist() == [16, 0, 0, 8, 0]
  for row in (1, 2, 4):
    _assert_equal(table.page_indices[row], before.page_indices[row])
  assert int(table.num_free) == 2
  _check_conservation(table)


def test_a_pool_short_by_one_page_refuses_the_row_and_changes_nothing():
  table = page_table.init(2, 8, 1, 4)
  refused, ok = _append(table, 17)
  assert ok == [False]
  _assert_equal(refused, table)


@pytest.mark.parametrize("num_new", [33, 2**31 - 1, -1, -(2**31)])
def test_a_row_that_cannot_be_that_long_is_refused_and_unchanged(num_new):
  table = page_table.init(64, 8, 2, 4)
  table, _ = _append(table, 3, 3)
  after, ok = _append(table, num_new, 1)
  assert ok == [False, True]
  assert after.kv_lens.tolist() == [3, 4]
  _assert_equal(after.page_indices, table.page_indices)
  _check_conservation(after)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_count_of_64_bits_does_not_wrap_around():
  table = page_table.init(64, 8, 2, 4)
  result = page_table.append(table, np.array([2**32 + 5, 5]))
  assert result.ok.tolist() == [False, True]
  assert result.table.kv_lens.tolist() == [0, 5]


def test_a_refused_long_row_takes_no_page_from_the_next():
  table = page_table.init(4, 8, 2, 4)
  table, ok = _append(table, 33, 32)
  assert ok == [False, True]
  _check_conservation(table)


def test_release_returns_every_page_and_twice_is_harmless():
  table = page_table.init(6, 8, 3, 4)
  table, _ = _append(table, 20, 5, 9)
  once = _release(table, 0, 2)
  assert once.kv_lens.tolist() == [0, 5, 0]
  assert int(once.num_free) == 5
  _check_conservation(once)
  _assert_equal(_release(once, 0, 2), once)


def test_release_of_no_row_changes_nothing():
  table, _ = _append(page_table.init(6, 8, 3, 4), 20, 5, 9)
  _assert_equal(_release(table), table)


def test_release_never_frees_a_page_that_another_row_names():
  table, _ = _append(page_table.init(4, 8, 2, 2), 16, 0)
  shared = dataclasses.replace(
    table,
    page_indices=table.page_indices.at[1].set(table.page_indices[0]),
    kv_lens=table.kv_lens.at[1].set(16),
    ref_counts=table.ref_counts * 2,
  )
  _check_conservation(shared)
  after = _release(shared, 0)
  assert int(after.num_free) == 2
  _check_conservation(after)
  assert int(_release(after, 1).num_free) == 4
  # Both at once: each page goes back once, not twice.
  both = _release(shared, 0, 1)
  assert int(both.num_free) == 4
  _check_conservation(both)


def test_an_old_table_stays_valid():
  old, _ = _append(page_table.init(4, 8, 2, 2), 8, 0)
  copy = jax.tree.map(np.array, old)
  _append(old, 8, 8)
  _release(old, 0)
  _assert_equal(jax.tree.map(np.array, old), copy)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_keep_every_page_accounted_for(seed):
  rng = np.random.default_rng(seed)
  append, release = jax.jit(page_table.append), jax.jit(page_table.release)
  table = page_table.init(12, 8, 6, 5)
  lens = np.zeros(6, int)
  for _ in range(60):
    if rng.random() < 0.3:
      rows = rng.random(6) < 0.3
      table = release(table, jnp.asarray(rows))
      lens[rows] = 0
    else:
      want = rng.integers(0, 14, 6) * (rng.random(6) < 0.7)
      free, ok, blocked = int(table.num_free), [], False
      for row in range(6):
        need = -(-(lens[row] + want[row]) // 8) - -(-lens[row] // 8)
        fits = lens[row] + want[row] <= 40
        if fits and need and need > free:
          blocked = True
        ok.append(bool(fits and not (need and blocked)))
        free -= need * ok[-1]
        lens[row] += want[row] * ok[-1]
      result = append(table, jnp.asarray(want, jnp.int32))
      assert result.ok.tolist() == ok
      table = result.table
    assert table.kv_lens.tolist() == lens.tolist()
    _check_conservation(table)


def test_slots_follow_the_table_and_drop_what_is_not_stored():
  table, _ = _append(page_table.init(6, 8, 2, 4), 8, 20)
  first, second = _pages(table, 0), _pages(table, 1)
  seq_ids = jnp.array([0, 0, 1, 1, 1, 0, 1, 1, 2, -1], jnp.int32)
  positions = jnp.array([0, 7, 0, 8, 19, 8, 20, -1, 0, 0], jnp.int32)
  slots = page_table.slots(table, seq_ids, positions)
  nowhere = 6 * 8
  assert slots.tolist() == [
    first[0] * 8,
    first[0] * 8 + 7,
    second[0] * 8,
    second[1] * 8,
    second[2] * 8 + 3,
    *[nowhere] * 5,
  ]


@pytest.mark.slow
def test_transitions_work_under_vmap_scan_and_donation():
  def run(table, num_new):
    def body(table, num_new):
      result = page_table.append(table, num_new)
      return result.table, result.ok

    return jax.lax.scan(body, table, num_new)

  table = page_table.init(6, 8, 2, 4)
  num_new = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 5, 2)))
  num_new = num_new.astype(jnp.int32)
  both = jax.tree.map(lambda x: jnp.stack([x, x]), table)
  batched, batched_ok = jax.jit(jax.vmap(run), donate_argnums=0)(both, num_new)
  for i in range(2):
    alone, ok = run(table, num_new[i])
    _assert_equal(jax.tree.map(lambda x, i=i: x[i], batched), alone)
    _assert_equal(batched_ok[i], ok)


class VariantsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_append_and_release(self):
    table = page_table.init(4, 8, 2, 2)
    result = self.variant(page_table.append)(table, jnp.array([9, 8]))
    assert result.ok.tolist() == [True, True]
    _check_conservation(result.table)
    after = self.variant(page_table.release)(
      result.table, jnp.array([True, False])
    )
    assert int(after.num_free) == 3
    _check_conservation(after)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(page_size=12), "page_size=12"),
    (dict(page_size=0), "page_size=0"),
    (dict(num_pages=0), "num_pages=0"),
    (dict(num_seqs=0), "num_seqs=0"),
    (dict(pages_per_seq=-1), "pages_per_seq=-1"),
    (dict(pages_per_seq=2**28), "pages_per_seq=268435456"),
  ],
)
def test_sizes_out_of_range_are_named(changes, message):
  sizes = dict(num_pages=4, page_size=8, num_seqs=2, pages_per_seq=2)
  with pytest.raises(ValueError, match=message):
    page_table.init(**(sizes | changes))


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_rows_are_named():
  table = page_table.init(4, 8, 2, 2)
  with pytest.raises(ValueError, match="num_new_tokens"):
    page_table.append(table, jnp.zeros(3, jnp.int32))
  with pytest.raises(ValueError, match="num_new_tokens"):
    page_table.append(table, jnp.zeros(2))
  with pytest.raises(ValueError, match="rows"):
    page_table.release(table, jnp.zeros(3, bool))
  with pytest.raises(ValueError, match="rows"):
    page_table.release(table, jnp.zeros(2, jnp.int32))
