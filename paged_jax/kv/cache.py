"""The paged KV cache of a model, and what can happen to its rows.

Every layer group has a page table and a pool of its own. A transition of the
cache is that of `page_table` on all groups at once. It serves a row in all
groups or in none: each group is asked, and then asked again for the rows that
all of them serve. Less demand never refuses a row that was served, so the
second answers agree.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax import page_table
from paged_jax.kv import layout, pool
from paged_jax.kv.config import CacheConfig
from paged_jax.kv.layout import KVLayout, LayerKV
from paged_jax.kv.pool import KVPool
from paged_jax.page_table import Changed, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerGroup:
  """The page table and the pool of a group of equal layers."""

  table: PageTable
  pool: KVPool
  layout: KVLayout = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """The keys and values of all layers of a model, for a batch of rows."""

  groups: tuple[LayerGroup, ...]
  layers: tuple[LayerKV, ...] = dataclasses.field(metadata=dict(static=True))
  # Of every op that reads, writes or copies pages; None chooses for each.
  implementation: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  @classmethod
  def init(cls, layers: Sequence[LayerKV], config: CacheConfig) -> "PagedCache":
    """Returns an empty cache.

    Args:
      layers: The layers of the model, `model.layers`.
      config: Sizes; `num_seqs`, `num_pages`, `max_len` and `dtype` must be
        given.

    Raises:
      ValueError: If a size is missing or out of its range, or `layers` do not
        fit together.
    """
    num_seqs, dtype, layers = config.num_seqs, config.dtype, tuple(layers)
    if num_seqs is None or dtype is None:
      raise ValueError(f"{num_seqs=} and {dtype=} of config must be given.")
    layouts = layout.layouts(layers, config.page_size, dtype)
    counts = config.pages_of_groups(len(layouts))
    groups = [
      LayerGroup(
        table=page_table.init(
          num_pages,
          config.page_size,
          num_seqs,
          config.pages_per_seq,
          debug=config.debug,
        ),
        pool=pool.init(
          num_pages,
          each.num_layers,
          each.num_kv_heads,
          each.page_size,
          each.head_dim,
          each.dtype,
        ),
        layout=each,
      )
      for each, num_pages in zip(layouts, counts, strict=True)
    ]
    return cls(tuple(groups), layers, config.implementation)

  @property
  def num_seqs(self) -> int:
    """Rows of the batch."""
    return self.groups[0].table.num_seqs

  @property
  def kv_lens(self) -> Array:
    """i32[num_seqs], tokens stored of each row; the same in all groups."""
    return self.groups[0].table.kv_lens

  @property
  def max_len(self) -> int:
    """Longest sequence that a row can hold, in tokens."""
    return self.groups[0].table.max_len

  def with_tables(self, tables: Sequence[PageTable]) -> "PagedCache":
    """Returns the cache with other tables, one for each group."""
    pairs = zip(self.groups, tables, strict=True)
    groups = [dataclasses.replace(group, table=t) for group, t in pairs]
    return dataclasses.replace(self, groups=tuple(groups))

  def with_pool(self, group: int, new_pool: KVPool) -> "PagedCache":
    """Returns the cache with another pool in one group."""
    changed = dataclasses.replace(self.groups[group], pool=new_pool)
    groups = (*self.groups[:group], changed, *self.groups[group + 1 :])
    return dataclasses.replace(self, groups=groups)


def append(
  cache: PagedCache,
  num_new_tokens: Int[Array, " num_seqs"],
  *,
  order: Int[Array, " num_seqs"] | None = None,
  max_new_tokens: int | None = None,
) -> tuple[PagedCache, Bool[Array, " num_seqs"]]:
  """Reserves room for new tokens, and carries out the copies that this needs.

  See `page_table.append` for the arguments and for who is served.

  Returns:
    The next cache, and `ok` bool[num_seqs], False for refused rows.
  """
  ask = functools.partial(
    page_table.append, order=order, max_new_tokens=max_new_tokens
  )
  appended = [ask(group.table, num_new_tokens) for group in cache.groups]
  ok = functools.reduce(jnp.logical_and, [each.ok for each in appended])
  if len(cache.groups) > 1:
    served = jnp.where(ok, num_new_tokens, 0)
    appended = [ask(group.table, served) for group in cache.groups]
  groups = []
  for group, each in zip(cache.groups, appended, strict=True):
    copied = pool.copy_pages(
      group.pool,
      each.copies.src,
      each.copies.dst,
      implementation=cache.implementation,
    )
    groups.append(dataclasses.replace(group, table=each.table, pool=copied))
  return dataclasses.replace(cache, groups=tuple(groups)), ok


def release(cache: PagedCache, rows: Bool[Array, " num_seqs"]) -> PagedCache:
  """Returns the cache with `rows` emptied; see `page_table.release`."""
  return cache.with_tables(
    [page_table.release(group.table, rows) for group in cache.groups]
  )


def fork(
  cache: PagedCache,
  src: Int[Array, "*num_forks"] | int,
  dst: Int[Array, "*num_forks"] | int,
) -> tuple[PagedCache, Bool[Array, "*num_forks"]]:
  """Makes empty rows copies of others; see `page_table.fork`.

  Returns:
    The next cache, and `ok` of the shape of `src`.
  """

  def change(table: PageTable, group: int, keep: Array | None) -> Changed:
    del group
    return page_table.fork(table, _asked(src, keep, cache.num_seqs), dst)

  return _change_all_or_none(cache, change)


def truncate(
  cache: PagedCache,
  seq: Int[Array, "*k"] | int,
  new_len: Int[Array, "*k"] | int,
) -> tuple[PagedCache, Bool[Array, "*k"]]:
  """Cuts rows to a shorter length; see `page_table.truncate`.

  Returns:
    The next cache, and `ok` of the shape of `seq`.
  """

  def change(table: PageTable, group: int, keep: Array | None) -> Changed:
    del group
    return page_table.truncate(
      table, _asked(seq, keep, cache.num_seqs), new_len
    )

  return _change_all_or_none(cache, change)


def adopt(
  cache: PagedCache,
  seq: Int[Array, "*k"] | int,
  pages: Sequence[Int[Array, "*k pages_per_seq"]],
  kv_len: Int[Array, "*k"] | int,
  min_lens: Sequence[Int[Array, "*k"] | int] | None = None,
) -> tuple[PagedCache, Bool[Array, "*k"]]:
  """Starts empty rows with pages that are in use; see `page_table.adopt`.

  Args:
    cache: The cache.
    seq: i32[k] or i32[], rows; `num_seqs` for nothing.
    pages: The pages of each group.
    kv_len: Tokens that the pages hold, the same in all groups.
    min_lens: `min_len` of each group; 0 if None.

  Returns:
    The next cache, and `ok` of the shape of `seq`.

  Raises:
    ValueError: If there is not one entry for each group, or as
      `page_table.adopt`.
  """
  num_groups = len(cache.groups)
  min_lens = (0,) * num_groups if min_lens is None else min_lens
  if len(pages) != num_groups or len(min_lens) != num_groups:
    raise ValueError(
      f"{len(pages)=} and {len(min_lens)=} must be the number of layer groups, "
      f"{num_groups}."
    )

  def change(table: PageTable, group: int, keep: Array | None) -> Changed:
    asked = _asked(seq, keep, cache.num_seqs)
    return page_table.adopt(table, asked, pages[group], kv_len, min_lens[group])

  return _change_all_or_none(cache, change)


def permute(
  cache: PagedCache, parents: Int[Array, " num_seqs"]
) -> tuple[PagedCache, Bool[Array, ""]]:
  """Makes each row a fork of an old row; see `page_table.permute`.

  Returns:
    The next cache, and `ok` bool[]: if False, no group is changed.
  """
  itself = jnp.arange(cache.num_seqs, dtype=jnp.int32)

  def change(table: PageTable, group: int, keep: Array | None) -> Changed:
    del group
    asked = parents if keep is None else jnp.where(keep, parents, itself)
    return page_table.permute(table, asked)

  return _change_all_or_none(cache, change)


def release_outside_window(
  cache: PagedCache, num_sink_tokens: Int[Array, ""] | int = 0
) -> PagedCache:
  """Gives back the pages that the windows of windowed groups have left behind.

  See `page_table.release_outside_window`.
  """
  tables = []
  for group in cache.groups:
    window, table = group.layout.sliding_window, group.table
    if window is not None:
      table = page_table.release_outside_window(table, window, num_sink_tokens)
    tables.append(table)
  return cache.with_tables(tables)


def _change_all_or_none(
  cache: PagedCache,
  change: Callable[[PageTable, int, Array | None], Changed],
) -> tuple[PagedCache, Array]:
  """Changes the tables of all groups, for entries that all of them serve.

  Args:
    cache: The cache.
    change: Returns the change of a table, of a group, for the entries to keep;
      None keeps all.
  """
  numbered = list(enumerate(group.table for group in cache.groups))
  changes = [change(table, i, None) for i, table in numbered]
  ok = functools.reduce(jnp.logical_and, [each.ok for each in changes])
  if len(changes) > 1:
    changes = [change(table, i, ok) for i, table in numbered]
  return cache.with_tables([each.table for each in changes]), ok


def _asked(rows: Array | int, keep: Array | None, nothing: int) -> Array | int:
  """Returns rows, with `nothing` for the entries that are not kept."""
  return rows if keep is None else jnp.where(keep, jnp.asarray(rows), nothing)
