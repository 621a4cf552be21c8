"""What must hold of a page table, as named booleans."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array

from paged_jax.page_table._state import PageTable, mapped, pages_for
from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Invariants:
  """Whether each invariant holds; every field is a bool[]."""

  entries_are_pages: Leaf  # entries are in [0, num_pages]
  lens_fit: Leaf  # 0 <= kv_lens <= max_len
  nothing_past_the_end: Leaf  # entries past the last page in use are unmapped
  holes_are_windows: Leaf  # pages are missing only where a window left them
  pages_differ: Leaf  # no row names a page twice
  counts_match: Leaf  # a count is the rows that name the page plus its holds
  holds_are_counts: Leaf  # holds are not negative
  stack_is_sound: Leaf  # the free pages are pages, each there once
  free_is_unused: Leaf  # a page is on the stack if and only if its count is 0
  tenants_exist: Leaf  # every row has a tenant

  @property
  def valid(self) -> Array:
    """Whether all of them hold."""
    return functools.reduce(jnp.logical_and, jax.tree.leaves(self))


def check(table: PageTable) -> Invariants:
  """Returns which invariants hold; usable inside jit."""
  num_pages = table.num_pages
  entries = table.page_indices
  is_mapped = mapped(table)
  named = jnp.zeros_like(table.ref_counts).at[_in_range(entries, num_pages)]
  counts = named.add(1, mode="drop") + table.holds

  depth = jnp.arange(num_pages, dtype=jnp.int32)
  on_stack = depth < table.num_free
  stack = jnp.where(on_stack, table.free_pages, num_pages)
  times = jnp.zeros_like(table.ref_counts).at[_in_range(stack, num_pages)]
  times = times.add(1, mode="drop")

  column = jnp.arange(table.pages_per_seq, dtype=jnp.int32)
  used = column[None] < pages_for(table.kv_lens, table.page_size)[:, None]
  # A window is at least one token wide: what it left ends before min_lens.
  left = (column[None] + 1) * table.page_size < table.min_lens[:, None]
  in_order = jnp.sort(entries, axis=1)
  same = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] < num_pages)
  lens, floor = table.kv_lens, table.min_lens
  return Invariants(
    entries_are_pages=jnp.all((entries >= 0) & (entries <= num_pages)),
    lens_fit=jnp.all((lens >= 0) & (lens <= table.max_len)),
    nothing_past_the_end=jnp.all(used | ~is_mapped),
    holes_are_windows=jnp.all(~used | is_mapped | left)
    & jnp.all((floor >= 0) & (floor <= lens)),
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
  """Checks the invariants with `checkify.check`, each under its name.

  Inside jit, the function that calls it has to be transformed by
  `checkify.checkify`; outside, a failure raises at once.
  """
  invariants = check(table)
  for field in dataclasses.fields(invariants):
    holds = getattr(invariants, field.name)
    checkify.check(holds, f"The page table is invalid: not {field.name}.")


def checked[**P, R](
  transition: Callable[Concatenate[PageTable, P], R],
) -> Callable[Concatenate[PageTable, P], R]:
  """Makes a transition check its result when the table says `debug`."""

  @functools.wraps(transition)
  def run(table: PageTable, *args: P.args, **kwargs: P.kwargs) -> R:
    result: Any = transition(table, *args, **kwargs)
    if table.debug:
      assert_valid(result if isinstance(result, PageTable) else result.table)
    return result

  return run


def _in_range(pages: Array, num_pages: int) -> Array:
  """Returns pages with all that are none as `num_pages`; -1 would wrap."""
  return jnp.where((pages < 0) | (pages > num_pages), num_pages, pages)
