import jax
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

NOTHING = 12


def _scattered():
  """Returns a table that uses pages 4, 5, 6, 8 and 9 of 12; two rows share."""
  table = page_table.init(12, 8, 4, 5)
  table, _, _ = append(table, 32, 20, 8, 12)
  table, _ = change("hold", table, pages(table, 3)[:1])
  table = release(table, 0, 2, 3)
  table, _ = change("fork", table, 1, 0)
  table, _, copies = append(table, 1, 0, 0, 0)
  assert len(copies) == 1
  assert_valid(table)
  return table


def _pool(num_pages):
  """Returns a pool whose pages hold their own numbers."""
  shape = dict(num_layers=2, num_kv_heads=1, page_size=8, head_dim=1)
  pool = kv_pool.init(num_pages, **shape, dtype=jnp.float32)
  number = jnp.arange(num_pages, dtype=jnp.float32).reshape(-1, 1, 1, 1, 1)
  return kv_pool.KVPool(k=pool.k + number, v=pool.v - number)


def _contents(table, pool, row):
  return [float(pool.k[page, 1, 0, 0, 0]) for page in pages(table, row)]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("max_copies", [None, 1, 2])
def test_compact_moves_pages_to_the_lowest_numbers(max_copies):
  table, pool = _scattered(), _pool(12)
  used = np.flatnonzero(table.ref_counts)
  num_used = used.size
  assert used.max() >= num_used
  contents = [_contents(table, pool, row) for row in (0, 1)]
  rounds = 0
  while int(np.flatnonzero(table.ref_counts).max()) >= num_used:
    result = page_table.compact(table, max_copies)
    moved = int((result.copies.src < NOTHING).sum())
    assert 0 < moved <= (max_copies or 6)
    table = result.table
    pool = kv_pool.copy_pages(pool, result.copies.src, result.copies.dst)
    assert_valid(table)
    rounds += 1
  assert rounds == (1 if max_copies is None else -(-4 // max_copies))
  assert [_contents(table, pool, row) for row in (0, 1)] == contents
  assert counts(table, 1) == [2, 2, 1]
  # The lowest free page is handed out next.
  table, _, _ = append(table, 0, 0, 1, 0)
  assert pages(table, 2) == [num_used]


def test_compacting_what_is_compact_moves_nothing():
  table, _, _ = append(page_table.init(12, 8, 4, 5), 32, 20, 8, 12)
  result = page_table.compact(table)
  assert (result.copies.src == NOTHING).all()
  assert (result.copies.dst == NOTHING).all()
  for field in ("page_indices", "ref_counts", "num_free"):
    assert_same(getattr(result.table, field), getattr(table, field))


@pytest.mark.slow
def test_a_pool_shrinks_when_it_fits_and_only_then():
  table, pool = _scattered(), _pool(12)
  contents = _contents(table, pool, 1)
  refused = page_table.resize(table, 5)
  assert not refused.ok
  assert not refused.table.kv_lens.any()
  assert_valid(refused.table)
  result = page_table.compact(table)
  pool = kv_pool.copy_pages(pool, result.copies.src, result.copies.dst)
  num_used = 12 - int(table.num_free)
  assert not page_table.resize(result.table, num_used - 1).ok
  small = page_table.resize(result.table, num_used)
  assert small.ok
  assert int(small.table.num_free) == 0
  assert_valid(small.table)
  pool = kv_pool.resize(pool, num_used)
  assert _contents(small.table, pool, 1) == contents


def test_a_pool_grows_by_free_pages():
  table, pool = _scattered(), _pool(12)
  result = page_table.resize(table, 15)
  assert result.ok
  assert int(result.table.num_free) == int(table.num_free) + 3
  assert_valid(result.table)
  for row in (0, 1):
    assert pages(result.table, row) == pages(table, row)
  grown = kv_pool.resize(pool, 15)
  assert _contents(result.table, grown, 1) == _contents(table, pool, 1)
  assert not grown.k[12:].any()
  _, ok, _ = append(result.table, 0, 0, 40, 40)
  assert ok == [True] * 4


def test_stats_equal_an_independent_count():
  table = _scattered()
  table, _, _ = append(table, 0, 0, 3, 0)
  stats = jax.tree.map(np.asarray, page_table.stats(table, page_bytes=100))
  named, waste = {}, 0
  for row in range(4):
    for column, page in enumerate(pages(table, row)):
      fill = min(8, int(table.kv_lens[row]) - 8 * column)
      named.setdefault(page, []).append(fill)
  waste = sum(8 - max(fills) for fills in named.values())
  held = set(np.flatnonzero(table.holds).tolist())
  used = set(named) | held
  assert stats.pages_used == len(used)
  assert stats.pages_free == 12 - len(used)
  assert stats.pages_shared == sum(len(f) > 1 for f in named.values()) == 2
  assert stats.pages_held == len(held) == 1
  assert stats.live_seqs == 3
  assert stats.waste_tokens == waste
  entries = sum(map(len, named.values()))
  np.testing.assert_allclose(
    stats.waste_percent, 100 * waste / (8 * len(named)), rtol=1e-6
  )
  np.testing.assert_allclose(stats.utilisation, len(used) / 12, rtol=1e-6)
  np.testing.assert_allclose(stats.sharing, entries / len(named), rtol=1e-6)
  assert stats.pages_saved == 3 * 5 - len(used)
  assert stats.bytes_saved == 100 * stats.pages_saved
  assert stats.tenant_pages is None


def test_stats_of_an_empty_table_are_finite():
  stats = jitted("stats")(page_table.init(4, 8, 2, 2, quotas=[4]))
  assert stats.waste_percent == 0
  assert stats.utilisation == 0
  assert stats.sharing == 1
  assert stats.tenant_pages.tolist() == [0]


@pytest.mark.slow
def test_a_page_that_rows_fill_differently_wastes_least():
  table, _, _ = append(page_table.init(4, 8, 2, 2), 7, 0)
  table, _ = change("fork", table, 0, 1)
  table, _ = change("truncate", table, 0, 2)
  assert page_table.stats(table).waste_tokens == 1


def _every_transition(table, num_new):
  """Applies all transitions that keep the shapes."""
  appended = page_table.append(table, num_new)
  table, oks = appended.table, [appended.ok]

  def then(result):
    oks.append(jnp.atleast_1d(result.ok))
    return result.table

  table = then(page_table.fork(table, i32(0), i32(3)))
  table = then(page_table.hold(table, table.page_indices[0]))
  table = page_table.release(table, jnp.array([False, True, False, False]))
  entries, length = table.page_indices[0], table.kv_lens[0]
  table = then(page_table.adopt(table, 1, entries, length))
  table = then(page_table.drop(table, entries))
  table = then(page_table.permute(table, i32(1, 2, 4, 0)))
  table = then(page_table.truncate(table, i32(0), table.kv_lens[:1] // 2))
  table = page_table.release_outside_window(table, 9, 8)
  table = then(page_table.assign(table, i32(2), i32(0)))
  table = page_table.compact(table).table
  return table, (jnp.concatenate(oks), page_table.check(table).valid)


@pytest.mark.slow
def test_all_transitions_work_under_vmap_scan_while_loop_and_donation():
  table = page_table.init(12, 8, 4, 5, quotas=[16])
  num_new = np.random.default_rng(0).integers(0, 12, (2, 6, 4))
  num_new = jnp.asarray(num_new, jnp.int32)

  def scan(table, num_new):
    return jax.lax.scan(_every_transition, table, num_new)

  def loop(table, num_new):
    def body(carry):
      i, table = carry
      return i + 1, _every_transition(table, num_new[i])[0]

    return jax.lax.while_loop(lambda c: c[0] < 6, body, (0, table))[1]

  both = jax.tree.map(lambda x: jnp.stack([x, x]), table)
  batched, (ok, valid) = jax.jit(jax.vmap(scan))(both, num_new)
  assert valid.all()
  assert ok.any()
  assert not ok.all()
  looped = jax.jit(loop, donate_argnums=0)
  step = jax.jit(_every_transition)
  for i in range(2):
    alone, alone_ok = table, []
    for n in num_new[i]:
      alone, (step_ok, _) = step(alone, n)
      alone_ok.append(step_ok)
    assert_same(jax.tree.map(lambda x, i=i: x[i], batched), alone)
    assert_same(ok[i], jnp.stack(alone_ok))
    donated = jax.tree.map(jnp.copy, table)
    assert_same(looped(donated, num_new[i]), alone)
    assert donated.page_indices.is_deleted()


def test_wrong_sizes_are_named():
  table = page_table.init(4, 8, 2, 2)
  with pytest.raises(ValueError, match="max_copies=0"):
    page_table.compact(table, 0)
  with pytest.raises(ValueError, match="num_pages=0"):
    page_table.resize(table, 0)
  with pytest.raises(ValueError, match="num_pages=0"):
    kv_pool.resize(_pool(4), 0)
