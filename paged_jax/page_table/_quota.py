"""Page limits of tenants: who uses how much, and who may have more."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.page_table._check import checked
from paged_jax.page_table._state import (
  Changed,
  PageTable,
  first_to_name,
  integers,
  mapped,
)

# A tenant with this quota may have any number of pages.
NO_QUOTA = 2**31 - 1


def tenant_pages(table: PageTable) -> Int[Array, " num_tenants"]:
  """Returns i32[num_tenants]: pages that the rows of each tenant name.

  A page that several rows share counts once for each of them, so that what a
  tenant uses does not depend on what others do.
  """
  used = jnp.sum(mapped(table), axis=1, dtype=jnp.int32)
  nobody = jnp.zeros_like(table.quotas)
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
  if not table.num_tenants:
    return jnp.ones(need.shape, bool)
  room = (table.quotas - tenant_pages(table)).at[tenants].get(mode="clip")
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
  shape = jnp.shape(seq)
  row = integers(seq, shape, "seq").reshape(-1)
  owner = integers(tenant, shape, "tenant").reshape(-1)
  asks = row != table.num_seqs
  exists = (row >= 0) & (row < table.num_seqs)
  empty = table.kv_lens.at[row].get(mode="clip") == 0
  known = (owner >= 0) & (owner < max(1, table.num_tenants))
  done = asks & exists & empty & known & first_to_name(row, asks)
  where = jnp.where(done, row, table.num_seqs)
  tenants = table.tenants.at[where].set(owner, mode="drop")
  ok = (done | ~asks).reshape(shape)
  return Changed(table=dataclasses.replace(table, tenants=tenants), ok=ok)
