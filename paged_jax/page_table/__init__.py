"""The page table: maps the tokens of each sequence to physical pages.

A `PageTable` is an immutable pytree of fixed-shape arrays. Each transition is
a pure function `table -> next table` that serves the whole batch inside jit,
without a loop over sequences or pages and without a host round trip.

For example, with `page_size=8` and `num_pages=6`:

    page_indices    kv_lens       page 0   free
  row 0 | 4 1 6 |     11          page 1   row 0, tokens 8 to 10
  row 1 | 4 3 6 |     14          page 2   free
                                  page 3   row 1, tokens 8 to 13
  6 is num_pages: no page         page 4   rows 0 and 1, tokens 0 to 7
                                  page 5   free

The slot of a token is its place in the pool; that of position 9 in row 1 is
3 * 8 + 1 = 25:

  slot = page_indices[row, position // page_size] * page_size
         + position % page_size

The free pages form a stack: `free_pages[:num_free]`. Reserving pages pops
them, releasing pages pushes them. The reference count of a page is the number
of rows that reference it plus the number of times that a prefix cache holds
it; a page is free if its count is 0. No row writes to a page whose count is
above 1: `append` asks for a copy of the page first (copy-on-write).

A transition that cannot serve a request in full refuses it: it returns
`ok=False` for the request, and changes nothing on its behalf.

    append     adds tokens to rows; may ask for page copies
    fork       makes empty rows copies of other rows, sharing all pages
    permute    replaces all rows by forks of old rows (beam search)
    truncate   shortens rows (rejected speculative tokens)
    release    empties rows; release_outside_window releases the pages that
               a sliding window has passed
    adopt      starts an empty row with pages that a prefix cache holds
    hold, drop add or remove a prefix cache's reference to pages
    compact, resize    move pages to the lowest numbers, so a pool can shrink
"""

from paged_jax.page_table._append import Appended, PageCopies, append
from paged_jax.page_table._check import Invariants, assert_valid, check
from paged_jax.page_table._quota import NO_QUOTA, assign, tenant_pages
from paged_jax.page_table._release import (
  freed_pages,
  release,
  release_outside_window,
  truncate,
)
from paged_jax.page_table._resize import Compacted, compact, resize
from paged_jax.page_table._sharing import adopt, drop, fork, hold, permute
from paged_jax.page_table._state import (
  Changed,
  PageTable,
  init,
  pages_for,
  slots,
)
from paged_jax.page_table._stats import Stats, stats

__all__ = [
  "NO_QUOTA",
  "Appended",
  "Changed",
  "Compacted",
  "Invariants",
  "PageCopies",
  "PageTable",
  "Stats",
  "adopt",
  "append",
  "assert_valid",
  "assign",
  "check",
  "compact",
  "drop",
  "fork",
  "freed_pages",
  "hold",
  "init",
  "pages_for",
  "permute",
  "release",
  "release_outside_window",
  "resize",
  "slots",
  "stats",
  "tenant_pages",
  "truncate",
]
