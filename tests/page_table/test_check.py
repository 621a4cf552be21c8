import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify
from pages import append, assert_valid, change, i32, jitted, pages

from paged_jax import page_table


def _table(debug=False):
  """Returns a table with a fork, a window, a hold and free pages."""
  table = page_table.init(12, 8, 4, 4, quotas=[20])
  table, _, _ = append(table, 20, 9, 0, 0)
  table, _ = change("fork", table, 1, 2)
  table, _ = change("hold", table, pages(table, 1)[:1])
  table = page_table.release_outside_window(table, 8)
  return dataclasses.replace(table, debug=debug)


def _with(table, **changes):
  return dataclasses.replace(
    table, **{name: f(getattr(table, name)) for name, f in changes.items()}
  )


def _of(table, row, column):
  return table.page_indices[row, column]


FAULTS = [
  (
    "entries_are_pages",
    lambda t: dict(page_indices=lambda x: x.at[3, 3].set(-1)),
  ),
  (
    "entries_are_pages",
    lambda t: dict(page_indices=lambda x: x.at[3, 3].set(13)),
  ),
  ("lens_fit", lambda t: dict(kv_lens=lambda x: x.at[0].set(33))),
  ("lens_fit", lambda t: dict(kv_lens=lambda x: x.at[3].set(-1))),
  ("nothing_past_the_end", lambda t: dict(kv_lens=lambda x: x.at[1].set(8))),
  ("holes_are_windows", lambda t: dict(kv_lens=lambda x: x.at[1].set(17))),
  ("holes_are_windows", lambda t: dict(min_lens=lambda x: x * 0)),
  ("holes_are_windows", lambda t: dict(min_lens=lambda x: x.at[1].set(10))),
  (
    "pages_differ",
    lambda t: dict(page_indices=lambda x: x.at[1, 1].set(x[1, 0])),
  ),
  (
    "counts_match",
    lambda t: dict(ref_counts=lambda x: x.at[_of(t, 1, 0)].add(1)),
  ),
  (  # a page named twice: row 3 takes a page of row 0
    "counts_match",
    lambda t: dict(
      page_indices=lambda x: x.at[3, 0].set(x[0, 1]),
      kv_lens=lambda x: x.at[3].set(8),
    ),
  ),
  ("counts_match", lambda t: dict(holds=lambda x: x * 0)),
  ("holds_are_counts", lambda t: dict(holds=lambda x: x.at[11].set(-1))),
  ("stack_is_sound", lambda t: dict(num_free=lambda x: x * 0 - 1)),
  ("stack_is_sound", lambda t: dict(num_free=lambda x: x * 0 + 13)),
  ("stack_is_sound", lambda t: dict(free_pages=lambda x: x.at[1].set(x[0]))),
  ("stack_is_sound", lambda t: dict(free_pages=lambda x: x.at[0].set(12))),
  ("stack_is_sound", lambda t: dict(free_pages=lambda x: x.at[0].set(-1))),
  (  # a free page named
    "free_is_unused",
    lambda t: dict(free_pages=lambda x: x.at[0].set(_of(t, 1, 0))),
  ),
  ("free_is_unused", lambda t: dict(num_free=lambda x: x - 1)),  # a leak
  ("tenants_exist", lambda t: dict(tenants=lambda x: x.at[2].set(1))),
  ("tenants_exist", lambda t: dict(tenants=lambda x: x.at[2].set(-1))),
]


@pytest.mark.parametrize(
  ("invariant", "fault"),
  FAULTS,
  ids=[f"{name}-{i}" for i, (name, _) in enumerate(FAULTS)],
)
def test_a_planted_fault_is_found(invariant, fault):
  table = _table()
  assert_valid(table)
  found = jitted("check")(_with(table, **fault(table)))
  assert not getattr(found, invariant)
  assert not found.valid


def test_every_invariant_has_a_planted_fault():
  names = {field.name for field in dataclasses.fields(page_table.Invariants)}
  assert {name for name, _ in FAULTS} == names


def test_assert_valid_raises_outside_jit_and_reports_inside():
  table = _table()
  page_table.assert_valid(table)
  broken = _with(table, num_free=lambda x: x - 1)
  with pytest.raises(checkify.JaxRuntimeError, match="free_is_unused"):
    page_table.assert_valid(broken)
  run = jax.jit(checkify.checkify(page_table.assert_valid))
  assert run(table)[0].get() is None
  assert "free_is_unused" in run(broken)[0].get()


TRANSITIONS = {
  "append": lambda t: page_table.append(t, i32(1, 1, 1, 9)),
  "fork": lambda t: page_table.fork(t, i32(0), i32(3)),
  "permute": lambda t: page_table.permute(t, i32(3, 2, 1, 0)),
  "truncate": lambda t: page_table.truncate(t, 1, 3),
  "release": lambda t: page_table.release(t, jnp.array([True] * 4)),
  "window": lambda t: page_table.release_outside_window(t, 4),
  "adopt": lambda t: page_table.adopt(t, 3, t.page_indices[1], 9),
  "hold": lambda t: page_table.hold(t, t.page_indices[1]),
  "drop": lambda t: page_table.drop(t, t.page_indices[1]),
  "assign": lambda t: page_table.assign(t, 3, 0),
  "compact": page_table.compact,
  "resize": lambda t: page_table.resize(t, 14),
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("name", TRANSITIONS)
def test_debug_checks_the_result_of_every_transition(name):
  run = jax.jit(checkify.checkify(TRANSITIONS[name]))
  table = _table(debug=True)
  broken = _with(table, tenants=lambda x: x - 1)
  assert run(table)[0].get() is None
  assert "tenants_exist" in run(broken)[0].get()
  # Without the switch there is nothing to report, and no check is compiled.
  silent = dataclasses.replace(broken, debug=False)
  jax.jit(TRANSITIONS[name])(silent)


def test_debug_checks_inside_a_loop():
  def body(carry):
    step, table = carry
    return step + 1, page_table.append(table, i32(1, 1, 0, 0)).table

  def run(table):
    return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, table))[1]

  table = _table(debug=True)
  error, after = jax.jit(checkify.checkify(run))(table)
  assert error.get() is None
  assert after.kv_lens.tolist() == [23, 12, 9, 0]
  error, _ = jax.jit(checkify.checkify(run))(
    _with(table, ref_counts=lambda x: x.at[11].add(1))
  )
  assert "counts_match" in error.get()
