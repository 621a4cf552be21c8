"""What the transitions that name rows have in common: checks, and results."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from paged_jax.page_table._state import (
  Changed,
  PageTable,
  first_to_name,
  integers,
)


class Requests(NamedTuple):
  """Entries of a call, each of which asks for a change of one row."""

  rows: Array  # i32[k]
  asks: Array  # bool[k], False for entries that ask for nothing
  valid: Array  # bool[k]: asks, for a row that exists, and is the first to
  shape: tuple[int, ...]  # of the arguments

  def flat(self, value: Array | int, name: str) -> Array:
    """Returns another argument, of the same shape, as i32[k].

    Raises:
      ValueError: If it has another shape or is not an integer.
    """
    return integers(value, self.shape, name).reshape(-1)

  def result(self, table: PageTable, done: Array) -> Changed:
    """Returns the next table, and `ok` of the shape of the arguments."""
    return Changed(table=table, ok=(done | ~self.asks).reshape(self.shape))


def requested(
  table: PageTable,
  rows: Array | int,
  name: str,
  also: Array | None = None,
) -> Requests:
  """Returns the entries of a call that name rows.

  Args:
    table: The table.
    rows: i32[...], rows; `num_seqs` for nothing.
    name: Of the argument.
    also: bool[k], False for entries that ask for nothing for another reason.

  Raises:
    ValueError: If `rows` are not integers.
  """
  shape = jnp.shape(rows)
  flat = integers(rows, shape, name).reshape(-1)
  asks = flat != table.num_seqs
  if also is not None:
    asks &= also
  exists = (flat >= 0) & (flat < table.num_seqs)
  valid = asks & exists & first_to_name(flat, asks)
  return Requests(flat, asks, valid, shape)
