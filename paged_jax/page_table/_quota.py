"""Page limits of tenants: who uses how much, and who may have more."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table._check import checked
from paged_jax.page_table._requests import requested
from paged_jax.page_table._state import Changed, PageTable, mapped

# A tenant with this quota may have any number of pages.
NO_QUOTA = 2**31 - 1


def tenant_pages(table: PageTable) -> Int[Array, " num_tenants"] | None:
  """Returns i32[num_tenants]: pages that the rows of each tenant name.

  A page that several rows share counts once for each of them, so that the use
  of a tenant does not depend on the others. None if the table has no quotas.
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
  """Returns whether quotas allow `need` more pages to each entry.

  Entries of a tenant are allowed in their order until the first that does not
  fit; it and every later one that needs a page are not. Other tenants go on.

  Args:
    table: The table, whose quotas and use count.
    tenants: i32[num_entries], tenant of each entry.
    need: i32[num_entries], pages it asks for, at least 0.
    ahead: bool, `[i, j]`: entry j comes before entry i.
  """
  if table.quotas is None:
    return jnp.ones(need.shape, bool)
  uses = pages_of_tenants(table, table.num_tenants)
  room = (table.quotas - uses).at[tenants].get(mode="clip")
  same = tenants[:, None] == tenants[None]
  total = need + jnp.sum(jnp.where(ahead & same, need[None], 0), axis=1)
  return (need == 0) | (total <= room)


def allows_in_turn(table: PageTable, tenants: Array, need: Array) -> Array:
  """Returns `allows` for entries that are served as they come."""
  entry = jnp.arange(need.shape[0], dtype=jnp.int32)
  return allows(table, tenants, need, entry[:, None] > entry[None])


@checked
def assign(
  table: PageTable,
  seq: Int[Array, "*k"] | int,
  tenant: Int[Array, "*k"] | int,
) -> Changed:
  """Makes empty rows belong to a tenant, before they start anew.

  Args:
    table: The current table.
    seq: i32[k] or i32[], rows; `num_seqs` for nothing.
    tenant: The same shape, tenants.

  Returns:
    The next table, and `ok` of the shape of `seq`: False if the row is out of
    range, not empty, or named earlier in the call, or if there is no such
    tenant. A refused row is left as it was.

  Raises:
    ValueError: If an argument has another shape or is not an integer.
  """
  requests = requested(table, seq, "seq")
  row, owner = requests.rows, requests.flat(tenant, "tenant")
  empty = table.kv_lens.at[row].get(mode="clip") == 0
  known = (owner >= 0) & (owner < max(1, table.num_tenants))
  done = requests.valid & empty & known
  where = jnp.where(done, row, table.num_seqs)
  tenants = table.tenants.at[where].set(owner, mode="drop")
  return requests.result(dataclasses.replace(table, tenants=tenants), done)
