"""Short forms of the page table's transitions and fields, for its tests."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import page_table


@functools.cache
def jitted(name):
  """Returns the jitted transition; all tests share its compiled programs."""
  return jax.jit(getattr(page_table, name))


def i32(*values):
  return jnp.asarray(values, jnp.int32)


def append(table, *num_new_tokens, order=None):
  """Returns the next table, `ok`, and the copies without unused entries."""
  order = None if order is None else i32(*order)
  result = jitted("append")(table, i32(*num_new_tokens), order=order)
  copies = zip(
    result.copies.src.tolist(), result.copies.dst.tolist(), strict=True
  )
  nothing = (table.num_pages, table.num_pages)
  return (
    result.table,
    result.ok.tolist(),
    [copy for copy in copies if copy != nothing],
  )


def change(name, table, *args):
  """Returns the next table and `ok` of another transition."""
  args = [jnp.asarray(arg, jnp.int32) for arg in args]
  result = jitted(name)(table, *args)
  return result.table, result.ok.tolist()


def release(table, *rows):
  mask = np.zeros(table.num_seqs, bool)
  mask[list(rows)] = True
  return jitted("release")(table, jnp.asarray(mask))


def pages(table, row):
  """Returns the pages that a row names; checks that nothing follows them."""
  entries = np.asarray(table.page_indices[row])
  used = -(-int(table.kv_lens[row]) // table.page_size)
  assert (entries[used:] == table.num_pages).all()
  return entries[:used].tolist()


def counts(table, row):
  """Returns the reference counts of the pages that a row names."""
  return [int(table.ref_counts[page]) for page in pages(table, row)]


def assert_valid(table):
  invariants = jax.tree.map(bool, jitted("check")(table))
  assert invariants.valid, invariants


def assert_same(a, b):
  """Asserts that two tables have the same bits, in unused entries too."""
  chex.assert_trees_all_equal(a, b)


def assert_row_unchanged(before, after, row):
  for field in ("page_indices", "kv_lens", "min_lens", "tenants"):
    old, new = getattr(before, field)[row], getattr(after, field)[row]
    np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def new_table(num_pages=8, **options):
  """Returns a table of four rows of at most three pages of 8 tokens."""
  return page_table.init(num_pages, 8, 4, 3, **options)


def family(num_rows, num_tokens=12, num_pages=8):
  """Returns a table whose rows are forks of row 0."""
  table, ok, _ = append(new_table(num_pages), num_tokens, 0, 0, 0)
  assert ok[0]
  children = range(1, num_rows)
  table, ok = change("fork", table, [0] * (num_rows - 1), list(children))
  assert all(ok)
  return table
