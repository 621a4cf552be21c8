"""Limits the number of pages that the rows of each tenant may reference."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table._check import checked
from paged_jax.page_table._requests import requested
from paged_jax.page_table._state import Changed, PageTable, mapped

# The quota of a tenant without a limit.
NO_QUOTA = 2**31 - 1


def tenant_pages(table: PageTable) -> Int[Array, " num_tenants"] | None:
  """Returns i32[num_tenants], the pages that the rows of each tenant reference.

  A page that several rows share counts once for each of them, so the use of one
  tenant does not depend on the others. Returns None if the table has no quotas.
  """
  if table.quotas is None:
    return None
  return pages_of_tenants(table, table.num_tenants)


def pages_of_tenants(
  table: PageTable, num_tenants: int
) -> Int[Array, " num_tenants"]:
  """Returns `tenant_pages` of a table that has quotas."""
  used = jnp.sum(mapped(table), axis=1, dtype=jnp.int32)
  nobody = jnp.zeros(num_tenants, jnp.int32)
  return nobody.at[table.tenants].add(used, mode="drop")


def allows(
  table: PageTable,
  tenants: Int[Array, " num_entries"],
  need: Int[Array, " num_entries"],
  ahead: Bool[Array, "num_entries num_entries"],
) -> Bool[Array, " num_entries"]:
  """Returns whether quotas allow `need` more pages to each request.

  The requests of a tenant are allowed in order until the first that exceeds the
  quota. That request and every later one of the tenant that needs a page are
  not. Other tenants are not affected.

  Args:
    table: The table, with its quotas.
    tenants: i32[num_entries], tenant of each request.
    need: i32[num_entries], pages that each request needs, at least 0.
    ahead: bool[num_entries, num_entries]: `[i, j]` is True if request j
      precedes request i.
  """
  if table.quotas is None:
    return jnp.ones(need.shape, bool)
  uses = pages_of_tenants(table, table.num_tenants)
  room = (table.quotas - uses).at[tenants].get(mode="clip")
  same = tenants[:, None] == tenants[None]
  total = need + jnp.sum(jnp.where(ahead & same, need[None], 0), axis=1)
  return (need == 0) | (total <= room)


def allows_in_turn(table: PageTable, tenants: Array, need: Array) -> Array:
  """Returns `allows` for requests that are served in array order."""
  entry = jnp.arange(need.shape[0], dtype=jnp.int32)
  return allows(table, tenants, need, entry[:, None] > entry[None])


@checked
def assign(
  table: PageTable,
  seq: Int[Array, "*k"] | int,
  tenant: Int[Array, "*k"] | int,
) -> Changed:
  """Assigns empty rows to tenants.

  Args:
    table: The current table.
    seq: i32[k] or i32[], rows; `num_seqs` for no request.
    tenant: The tenant of each row, in the shape of `seq`.

  Returns:
    The next table, and `ok` in the shape of `seq`: False if the row is out of
    range, not empty, or given earlier in the call, or if the tenant is out of
    range. A refused row stays as it was.

  Raises:
    ValueError: If `seq` or `tenant` is not an integer array, or if their shapes
      differ.
  """
  requests = requested(table, seq, "seq")
  row, owner = requests.rows, requests.flat(tenant, "tenant")
  empty = table.kv_lens.at[row].get(mode="clip") == 0
  known = (owner >= 0) & (owner < max(1, table.num_tenants))
  done = requests.valid & empty & known
  where = jnp.where(done, row, table.num_seqs)
  tenants = table.tenants.at[where].set(owner, mode="drop")
  return requests.result(dataclasses.replace(table, tenants=tenants), done)
