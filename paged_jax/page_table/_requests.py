"""Checks and results shared by the transitions that take row numbers."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from paged_jax.page_table import arguments
from paged_jax.page_table._state import (
  Changed,
  PageTable,
)


class Requests(NamedTuple):
  """The requests of a call; each asks to change one row."""

  rows: Array  # i32[k]
  asks: Array  # bool[k], False for no request
  valid: Array  # bool[k], the first request for a row that exists
  shape: tuple[int, ...]  # of the arguments

  def flat(self, value: Array | int, name: str) -> Array:
    """Returns another argument of the same shape as i32[k].

    Raises:
      ValueError: If it has another shape or is not an integer array.
    """
    return arguments.integers(value, self.shape, name).reshape(-1)

  def result(self, table: PageTable, done: Array) -> Changed:
    """Returns the next table, and `ok` in the shape of the arguments."""
    return Changed(table=table, ok=(done | ~self.asks).reshape(self.shape))


def requested(
  table: PageTable,
  rows: Array | int,
  name: str,
  also: Array | None = None,
) -> Requests:
  """Returns the requests of a call.

  Args:
    table: The table.
    rows: i32[...], rows; `num_seqs` for no request.
    name: Name of the argument, for error messages.
    also: bool[k], False where another argument makes it no request.

  Raises:
    ValueError: If `rows` is not an integer array.
  """
  shape = jnp.shape(rows)
  flat = arguments.integers(rows, shape, name).reshape(-1)
  asks = flat != table.num_seqs
  if also is not None:
    asks &= also
  exists = (flat >= 0) & (flat < table.num_seqs)
  valid = asks & exists & arguments.is_first(flat, asks)
  return Requests(flat, asks, valid, shape)
