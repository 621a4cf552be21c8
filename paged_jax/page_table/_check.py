"""Checks the invariants of a page table."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array

from paged_jax.page_table import arguments
from paged_jax.page_table._state import PageTable, mapped, pages_for
from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Invariants:
  """Whether each invariant holds; every field is a bool[]."""

  entries_are_pages: Leaf  # page_indices are in [0, num_pages]
  lens_fit: Leaf  # 0 <= kv_lens <= max_len
  nothing_past_the_end: Leaf  # entries past a row's last page are unmapped
  holes_are_windows: Leaf  # only pages that a window has passed are holes
  pages_differ: Leaf  # no row references a page twice
  counts_match: Leaf  # ref_counts are the rows with the page plus its holds
  holds_are_counts: Leaf  # holds are not negative
  stack_is_sound: Leaf  # the stack holds num_free pages in range, each once
  free_is_unused: Leaf  # a page is on the stack if and only if its count is 0
  tenants_exist: Leaf  # 0 <= tenants < max(1, num_tenants)

  @property
  def valid(self) -> Array:
    """bool[], whether all invariants hold."""
    return functools.reduce(jnp.logical_and, jax.tree.leaves(self))


def check(table: PageTable) -> Invariants:
  """Returns which invariants hold. Works inside jit.

  Args:
    table: The table; it is not changed.
  """
  num_pages = table.num_pages
  entries = table.page_indices
  is_mapped = mapped(table)
  references = jnp.zeros_like(table.ref_counts).at[
    arguments.or_none(entries, num_pages)
  ]
  counts = references.add(1, mode="drop") + table.holds

  depth = jnp.arange(num_pages, dtype=jnp.int32)
  on_stack = depth < table.num_free
  stack = jnp.where(on_stack, table.free_pages, num_pages)
  times = jnp.zeros_like(table.ref_counts).at[
    arguments.or_none(stack, num_pages)
  ]
  times = times.add(1, mode="drop")

  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  used = column[None] < pages_for(table.kv_lens, table.page_size)[:, None]
  # A window is at least one token wide, so a hole ends before min_lens.
  is_passed = (column[None] + 1) * table.page_size < table.min_lens[:, None]
  in_order = jnp.sort(entries, axis=1)
  same = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] < num_pages)
  lens, min_lens = table.kv_lens, table.min_lens
  return Invariants(
    entries_are_pages=jnp.all((entries >= 0) & (entries <= num_pages)),
    lens_fit=jnp.all((lens >= 0) & (lens <= table.max_len)),
    nothing_past_the_end=jnp.all(used | ~is_mapped),
    holes_are_windows=jnp.all(~used | is_mapped | is_passed)
    & jnp.all((min_lens >= 0) & (min_lens <= lens)),
    pages_differ=~jnp.any(same),
    counts_match=jnp.all(counts == table.ref_counts),
    holds_are_counts=jnp.all(table.holds >= 0),
    stack_is_sound=(table.num_free >= 0)
    & (table.num_free <= num_pages)
    & jnp.all(times <= 1)
    & (jnp.sum(times, dtype=jnp.int32) == table.num_free),
    free_is_unused=jnp.all((times > 0) == (table.ref_counts == 0)),
    tenants_exist=jnp.all(
      (table.tenants >= 0) & (table.tenants < max(1, table.num_tenants))
    ),
  )


def assert_valid(table: PageTable) -> None:
  """Checks the invariants with `checkify.check`, naming the one that fails.

  Inside jit, the calling function must be transformed by `checkify.checkify`.

  Raises:
    checkify.JaxRuntimeError: Outside jit, if an invariant does not hold.
  """
  invariants = check(table)
  for field in dataclasses.fields(invariants):
    holds = getattr(invariants, field.name)
    checkify.check(holds, f"The page table is invalid: {field.name} is False.")


def checked[**P, R](
  transition: Callable[Concatenate[PageTable, P], R],
) -> Callable[Concatenate[PageTable, P], R]:
  """Makes a transition check its result if `table.debug` is True."""

  @functools.wraps(transition)
  def run(table: PageTable, *args: P.args, **kwargs: P.kwargs) -> R:
    result: Any = transition(table, *args, **kwargs)
    if table.debug:
      assert_valid(result if isinstance(result, PageTable) else result.table)
    return result

  return run
