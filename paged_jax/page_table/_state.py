"""The state of the page table, and functions that read it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
  """The pages of every sequence, the reference counts, and the free pages.

  The value `num_pages` means "no page". It is never -1, because a scatter or
  gather with a negative index wraps around to the last page.
  """

  page_indices: Leaf  # i32[num_seqs, pages_per_seq], num_pages where unmapped
  kv_lens: Leaf  # i32[num_seqs], tokens stored
  # Shortest length to which `truncate` can cut the row: below it, the window
  # of the last token would include released pages. 0 if none were released.
  min_lens: Leaf  # i32[num_seqs]
  ref_counts: Leaf  # i32[num_pages], rows with the page, plus its holds
  holds: Leaf  # i32[num_pages], references by a prefix cache
  free_pages: Leaf  # i32[num_pages], a stack: the first num_free are free
  num_free: Leaf  # i32[]
  tenants: Leaf  # i32[num_seqs], whose quota the row's pages count against
  quotas: Leaf | None  # i32[num_tenants], page limits; None: no limits
  page_size: int = dataclasses.field(metadata=dict(static=True))  # tokens
  # Whether transitions check their result (see `assert_valid`).
  debug: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def num_seqs(self) -> int:
    """Number of rows of the batch."""
    return self.page_indices.shape[0]

  @property
  def pages_per_seq(self) -> int:
    """Maximum number of pages of a row."""
    return self.page_indices.shape[1]

  @property
  def num_pages(self) -> int:
    """Number of pages of the pool; as a page index, it means no page."""
    return self.ref_counts.shape[0]

  @property
  def num_tenants(self) -> int:
    """Number of tenants with a quota; 0 if the table has no quotas."""
    return 0 if self.quotas is None else self.quotas.shape[0]

  @property
  def max_len(self) -> int:
    """Longest sequence that a row can hold, in tokens."""
    return self.pages_per_seq * self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Changed:
  """The next table, and which requests were carried out."""

  table: PageTable
  ok: Leaf  # bool, one for each request


def init(
  num_pages: int,
  page_size: int,
  num_seqs: int,
  pages_per_seq: int,
  *,
  tenants: Sequence[int] | None = None,
  quotas: Sequence[int] | None = None,
  debug: bool = False,
) -> PageTable:
  """Returns an empty table: all rows have length 0, all pages are free.

  Args:
    num_pages: Number of pages of the pool, at least 1.
    page_size: Tokens per page; a positive multiple of 8.
    num_seqs: Number of rows of the batch, at least 1.
    pages_per_seq: Maximum number of pages of a row, at least 1.
    tenants: Tenant of each row, in `[0, len(quotas))`; all 0 if None.
    quotas: Maximum number of pages that the rows of each tenant may reference
      together, at least 0; `NO_QUOTA` for no limit. A page counts once for each
      row that references it. If None, nothing is limited.
    debug: Whether each transition checks its result (see `assert_valid`).

  Raises:
    ValueError: If an argument is out of its range, if a row could hold 2**30
      tokens or more, if `page_indices` would have 2**31 entries or more, or if
      `tenants` does not have one entry for each row.
  """
  _check_sizes(num_pages, page_size, num_seqs, pages_per_seq)
  owners, limits = _tenancy(num_seqs, tenants, quotas)
  return PageTable(
    page_indices=jnp.full((num_seqs, pages_per_seq), num_pages, jnp.int32),
    kv_lens=jnp.zeros(num_seqs, jnp.int32),
    min_lens=jnp.zeros(num_seqs, jnp.int32),
    ref_counts=jnp.zeros(num_pages, jnp.int32),
    holds=jnp.zeros(num_pages, jnp.int32),
    # Pages are popped from the end: page 0 is the first to be used.
    free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
    num_free=jnp.asarray(num_pages, jnp.int32),
    tenants=jnp.asarray(owners, jnp.int32),
    quotas=None if limits is None else jnp.asarray(limits, jnp.int32),
    page_size=page_size,
    debug=debug,
  )


def pages_for(num_tokens: Array | int, page_size: int) -> Array:
  """Returns the number of pages that hold `num_tokens` tokens.

  Args:
    num_tokens: Number of tokens, an integer or an integer array.
    page_size: Tokens per page.
  """
  return (jnp.asarray(num_tokens) + (page_size - 1)) // page_size


def slots(
  table: PageTable,
  seq_ids: Int[Array, " num_tokens"],
  positions: Int[Array, " num_tokens"],
) -> Int[Array, " num_tokens"]:
  """Returns the slots of tokens in the pool: `page * page_size + offset`.

  Args:
    table: The table.
    seq_ids: i32[num_tokens], row of each token.
    positions: i32[num_tokens], position of each token in its row.

  Returns:
    i32[num_tokens]. Tokens of no row, outside `[0, kv_lens)` of their row, or
    in an unmapped page get `num_pages * page_size`, which writes drop.
  """
  inside = (seq_ids >= 0) & (seq_ids < table.num_seqs)
  row = jnp.where(inside, seq_ids, 0)
  inside &= (positions >= 0) & (positions < table.kv_lens[row])
  position = jnp.where(inside, positions, 0)
  page = table.page_indices[row, position // table.page_size]
  slot = page * table.page_size + position % table.page_size
  nowhere = table.num_pages * table.page_size
  return jnp.where(inside & (page < table.num_pages), slot, nowhere)


def mapped(table: PageTable) -> Array:
  """Returns bool[num_seqs, pages_per_seq], True where an entry is a page."""
  return table.page_indices < table.num_pages


def _check_sizes(
  num_pages: int, page_size: int, num_seqs: int, pages_per_seq: int
) -> None:
  sizes = dict(
    num_pages=num_pages, num_seqs=num_seqs, pages_per_seq=pages_per_seq
  )
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if page_size < 1 or page_size % 8:
    raise ValueError(f"{page_size=} must be a positive multiple of 8.")
  if num_pages * page_size >= 2**31:
    raise ValueError(
      f"{num_pages=} pages of {page_size=} tokens exceed the limit of "
      "2**31 - 1 slots."
    )
  if pages_per_seq * page_size >= 2**30:
    raise ValueError(
      f"{pages_per_seq=} pages of {page_size=} tokens exceed the limit of "
      "2**30 - 1 tokens per sequence."
    )
  if num_seqs * pages_per_seq >= 2**31:
    raise ValueError(
      f"{num_seqs=} rows of {pages_per_seq=} pages exceed the limit of "
      "2**31 - 1 entries."
    )


def _tenancy(
  num_seqs: int,
  tenants: Sequence[int] | None,
  quotas: Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the tenant of each row, and the quotas or None."""
  limits = np.asarray(() if quotas is None else quotas, np.int64)
  owners = np.asarray([0] * num_seqs if tenants is None else tenants, np.int64)
  if limits.ndim != 1 or (limits < 0).any() or (limits >= 2**31).any():
    raise ValueError(f"{quotas=} must be one integer in [0, 2**31) per tenant.")
  if owners.shape != (num_seqs,):
    raise ValueError(f"{tenants=} must have one entry for each {num_seqs=}.")
  if (owners < 0).any() or (owners >= max(1, limits.size)).any():
    raise ValueError(f"{tenants=} must be in [0, {max(1, limits.size)}).")
  return owners, limits if limits.size else None
