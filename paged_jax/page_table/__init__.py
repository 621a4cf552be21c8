"""The page table: which physical pages hold which sequence, as a JAX value.

A `PageTable` is an immutable pytree of fixed-shape arrays. Every transition is
a pure function `table -> next table` that runs inside jit for the whole batch
at once: there is no loop over sequences or pages, and no host round trip.

The free pages form a stack: `free_pages[:num_free]`. Handing out pages pops
them, returning pages pushes them. A page that is named by a row, or held by a
cache, has a positive reference count and is not on the stack. A page whose
count is above one is never written: `append` asks for a copy first.

Exhaustion is data: what cannot be served whole is refused. A refused entry
gets `ok=False`, and changes nothing.

    append     rows grow by some tokens each; may ask for page copies
    fork       empty rows start as copies of others, sharing all pages
    permute    all rows become forks of old rows at once (beam search)
    truncate   rows shrink (the undo of speculative decoding)
    release    rows end; release_outside_window frees what a window has left
    adopt      an empty row starts with pages that a prefix cache holds
    hold, drop a prefix cache keeps pages, or lets them go
    compact, resize    pages move to the lowest numbers, so a pool can shrink
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
  check_rows,
  first_to_name,
  init,
  integers,
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
  "check_rows",
  "compact",
  "drop",
  "first_to_name",
  "fork",
  "freed_pages",
  "hold",
  "init",
  "integers",
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
