"""The page table: which physical pages hold which sequence, as a JAX value.

A `PageTable` is an immutable pytree of fixed-shape arrays. Every transition is
a pure function `table -> next table` that runs inside jit for the whole batch
at once: there is no loop over sequences or pages, and no host round trip.

The free pages form a stack: `free_pages[:num_free]`. Handing out pages pops
them, returning pages pushes them. A page that is named by a row, or held by a
cache, has a positive reference count and is not on the stack.

Exhaustion is data: a sequence that cannot be served whole keeps its length, its
pages and all counts, and gets `ok=False`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
  """Pages of every sequence, their reference counts, and the free pages.

  The value `num_pages` means "no page". Never -1: a scatter or a gather with a
  negative index wraps to the last page.
  """

  page_indices: Leaf  # i32[num_seqs, pages_per_seq], num_pages where unmapped
  kv_lens: Leaf  # i32[num_seqs], tokens stored
  ref_counts: Leaf  # i32[num_pages], rows that name the page, plus holds
  free_pages: Leaf  # i32[num_pages], a stack: the first num_free are free
  num_free: Leaf  # i32[]
  page_size: int = dataclasses.field(metadata=dict(static=True))  # tokens

  @property
  def num_seqs(self) -> int:
    """Rows of the batch."""
    return self.page_indices.shape[0]

  @property
  def pages_per_seq(self) -> int:
    """Most pages that a row can name."""
    return self.page_indices.shape[1]

  @property
  def num_pages(self) -> int:
    """Pages of the pool; as a page index, no page."""
    return self.ref_counts.shape[0]

  @property
  def max_len(self) -> int:
    """Longest sequence that a row can hold, in tokens."""
    return self.pages_per_seq * self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appended:
  """Result of `append`: the next table, and which rows were served."""

  table: PageTable
  ok: Leaf  # bool[num_seqs]


def init(
  num_pages: int, page_size: int, num_seqs: int, pages_per_seq: int
) -> PageTable:
  """Returns an empty table: every row of length 0, every page free.

  Args:
    num_pages: Pages of the pool, at least 1.
    page_size: Tokens a page holds; a positive multiple of 8.
    num_seqs: Rows of the batch, at least 1.
    pages_per_seq: Most pages a row can name, at least 1.

  Raises:
    ValueError: If an argument is out of its range.
  """
  for name, value in (
    ("num_pages", num_pages),
    ("num_seqs", num_seqs),
    ("pages_per_seq", pages_per_seq),
  ):
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if page_size < 1 or page_size % 8:
    raise ValueError(f"{page_size=} must be a positive multiple of 8.")
  if pages_per_seq * page_size >= 2**30:
    raise ValueError(
      f"{pages_per_seq=} pages of {page_size=} tokens pass the limit of "
      "2**30 - 1 tokens a sequence."
    )
  return PageTable(
    page_indices=jnp.full((num_seqs, pages_per_seq), num_pages, jnp.int32),
    kv_lens=jnp.zeros(num_seqs, jnp.int32),
    ref_counts=jnp.zeros(num_pages, jnp.int32),
    # Popped from the end: page 0 is handed out first.
    free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
    num_free=jnp.asarray(num_pages, jnp.int32),
    page_size=page_size,
  )


def pages_for(num_tokens: Array | int, page_size: int) -> Array:
  """Returns how many pages of `page_size` hold `num_tokens` tokens."""
  return (jnp.asarray(num_tokens) + (page_size - 1)) // page_size


def append(
  table: PageTable, num_new_tokens: Int[Array, " num_seqs"]
) -> Appended:
  """Reserves room for new tokens in every row at once.

  Rows are served in row order until the first that does not fit; it and every
  later row that needs a page are refused. Rows that need no page go on, unless
  their new length would pass the width of the table. A refused row is left
  bit for bit as it was.

  Lengths advance at once, for served rows only: the caller then writes K and V
  at the slots of the new tokens (see `slots`).

  Args:
    table: The current table.
    num_new_tokens: i32[num_seqs], tokens to add to each row, at least 0.

  Returns:
    The next table, and `ok` bool[num_seqs]: False for refused rows. A row that
    asks for no token is always `ok`.

  Raises:
    ValueError: If `num_new_tokens` has another shape or is not an integer.
  """
  num_new_tokens = _row_counts(table, num_new_tokens, "num_new_tokens")
  # Two's complement would let a huge request wrap around to a small length.
  new_lens = table.kv_lens + jnp.minimum(num_new_tokens, table.max_len + 1)
  pages_before = pages_for(table.kv_lens, table.page_size)
  need = pages_for(new_lens, table.page_size) - pages_before
  valid = (num_new_tokens >= 0) & (new_lens <= table.max_len)
  need = jnp.where(valid, need, 0)
  last = jnp.cumsum(
    need, dtype=jnp.int32
  )  # pages wanted by this row and all before it
  ok = valid & ((need == 0) | (last <= table.num_free))

  taken = jnp.where(ok, need, 0)
  # The served rows that need pages are a prefix of those that need any, so
  # that `last - need` is where this row's pages start on the stack.
  first = last - need
  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  fresh = column[None] - pages_before[:, None]
  is_new = (fresh >= 0) & (fresh < taken[:, None])
  source = table.num_free - 1 - first[:, None] - fresh
  page = table.free_pages.at[source].get(mode="clip")
  page_indices = jnp.where(is_new, page, table.page_indices)

  num_taken = jnp.sum(taken, dtype=jnp.int32)
  depth = jnp.arange(table.num_pages, dtype=jnp.int32)
  popped = (depth >= table.num_free - num_taken) & (depth < table.num_free)
  popped_page = jnp.where(popped, table.free_pages, table.num_pages)
  return Appended(
    table=dataclasses.replace(
      table,
      page_indices=page_indices,
      kv_lens=jnp.where(ok, new_lens, table.kv_lens),
      ref_counts=table.ref_counts.at[popped_page].set(1, mode="drop"),
      num_free=table.num_free - num_taken,
    ),
    ok=ok,
  )


def release(table: PageTable, rows: Bool[Array, " num_seqs"]) -> PageTable:
  """Empties rows and gives back every page that nobody else names or holds.

  Releasing an empty row changes nothing.

  Args:
    table: The current table.
    rows: bool[num_seqs], which rows to empty.

  Returns:
    The next table.

  Raises:
    ValueError: If `rows` has another shape or is not boolean.
  """
  check_rows(table, rows)
  leaving = jnp.where(rows[:, None], table.page_indices, table.num_pages)
  named = jnp.zeros_like(table.ref_counts).at[leaving].add(1, mode="drop")
  ref_counts = table.ref_counts - named
  freed = (named > 0) & (ref_counts == 0)
  free_pages, num_free = _push(table, freed)
  return dataclasses.replace(
    table,
    page_indices=jnp.where(rows[:, None], table.num_pages, table.page_indices),
    kv_lens=jnp.where(rows, 0, table.kv_lens),
    ref_counts=ref_counts,
    free_pages=free_pages,
    num_free=num_free,
  )


def slots(
  table: PageTable,
  seq_ids: Int[Array, " num_tokens"],
  positions: Int[Array, " num_tokens"],
) -> Int[Array, " num_tokens"]:
  """Returns where in the pool tokens live: `page * page_size + offset`.

  Args:
    table: The table.
    seq_ids: i32[num_tokens], row of each token.
    positions: i32[num_tokens], position of each token in its row.

  Returns:
    i32[num_tokens]; `num_pages * page_size`, which writes drop, for tokens
    outside `[0, kv_lens)` of their row, of no row, or in an unmapped page.
  """
  inside = (seq_ids >= 0) & (seq_ids < table.num_seqs)
  row = jnp.where(inside, seq_ids, 0)
  inside &= (positions >= 0) & (positions < table.kv_lens[row])
  position = jnp.where(inside, positions, 0)
  page = table.page_indices[row, position // table.page_size]
  slot = page * table.page_size + position % table.page_size
  nowhere = table.num_pages * table.page_size
  return jnp.where(inside & (page < table.num_pages), slot, nowhere)


def check_rows(table: PageTable, rows: Array) -> None:
  """Raises a ValueError if `rows` is not bool[num_seqs]."""
  dtype, shape = jnp.result_type(rows), jnp.shape(rows)
  if shape != (table.num_seqs,) or dtype != jnp.bool_:
    raise ValueError(
      f"rows must be bool[{table.num_seqs}], got {dtype}{shape}."
    )


def _push(table: PageTable, freed: Array) -> tuple[Array, Array]:
  """Puts the pages marked in bool[num_pages] on the free stack."""
  rank = jnp.cumsum(freed, dtype=jnp.int32)
  place = jnp.where(freed, table.num_free + rank - 1, table.num_pages)
  page = jnp.arange(table.num_pages, dtype=jnp.int32)
  free_pages = table.free_pages.at[place].set(page, mode="drop")
  return free_pages, table.num_free + rank[-1]


def _row_counts(table: PageTable, counts: Array, name: str) -> Array:
  if isinstance(counts, np.ndarray) and counts.dtype.kind in "iu":
    # 64-bit counts would wrap around.
    counts = np.clip(counts, -1, table.max_len + 1).astype(np.int32)
  counts = jnp.asarray(counts)
  if counts.shape != (table.num_seqs,):
    raise ValueError(
      f"{name} must have shape ({table.num_seqs},), got {counts.shape}."
    )
  if not jnp.issubdtype(counts.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {counts.dtype}.")
  return jnp.clip(counts, -1, table.max_len + 1).astype(jnp.int32)
