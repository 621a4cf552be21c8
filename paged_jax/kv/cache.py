"""The paged KV cache of a model, and its transitions.

Each layer group has its own page table and pool. A transition of the cache
applies the transition of `page_table` with the same name to all groups, and
serves a row in all groups or in none: it asks every group, then asks again for
only the rows that all groups serve. The second answers agree, because a row
that was served is never refused when other rows ask for less.
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
  # Implementation of every op on the cache (attention, writes, page copies):
  # "mosaic_gpu", "xla", or None to choose for each op.
  implementation: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  @classmethod
  def init(cls, layers: Sequence[LayerKV], config: CacheConfig) -> "PagedCache":
    """Returns an empty cache.

    Args:
      layers: The layers of the model, `model.layers`.
      config: The sizes; `num_seqs`, `num_pages`, `max_len` and `dtype` must not
        be None.

    Raises:
      ValueError: If a size is None or out of its range, if `config.num_pages`
        is a tuple of the wrong length, if `layers` is empty, or if a layer
        shares the keys and values of a layer that differs or is not earlier.
    """
    num_seqs, dtype, layers = config.num_seqs, config.dtype, tuple(layers)
    if num_seqs is None or dtype is None:
      raise ValueError(f"config.{num_seqs=} and config.{dtype=} must be given.")
    layouts = layout.layouts(layers, config.page_size, dtype)
    counts = config.pages_of_groups(len(layouts))
    groups = [
      LayerGroup(
        # First: it has the smaller limit of `num_pages`.
        pool=pool.init(
          num_pages,
          each.num_layers,
          each.num_kv_heads,
          each.page_size,
          each.head_dim,
          each.dtype,
        ),
        table=page_table.init(
          num_pages,
          config.page_size,
          num_seqs,
          config.pages_per_seq,
          debug=config.debug,
        ),
        layout=each,
      )
      for each, num_pages in zip(layouts, counts, strict=True)
    ]
    return cls(tuple(groups), layers, config.implementation)

  @property
  def num_seqs(self) -> int:
    """Number of rows of the batch."""
    return self.groups[0].table.num_seqs

  @property
  def kv_lens(self) -> Array:
    """i32[num_seqs], tokens stored in each row; the same in all groups."""
    return self.groups[0].table.kv_lens

  @property
  def max_len(self) -> int:
    """Longest sequence that a row can hold, in tokens."""
    return self.groups[0].table.max_len

  def with_tables(self, tables: Sequence[PageTable]) -> "PagedCache":
    """Returns the cache with its page tables replaced.

    Args:
      tables: One for each layer group.

    Raises:
      ValueError: If their number is not that of the groups.
    """
    pairs = zip(self.groups, tables, strict=True)
    groups = [dataclasses.replace(group, table=t) for group, t in pairs]
    return dataclasses.replace(self, groups=tuple(groups))

  def with_pool(self, group: int, new_pool: KVPool) -> "PagedCache":
    """Returns the cache with the pool of one group replaced.

    Args:
      group: Index of the layer group.
      new_pool: Its pool.
    """
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
  """Reserves pages for new tokens, and carries out the page copies.

  Most callers want `begin_step`, which calls this function.

  Args:
    cache: The cache; donate it, and do not read the old one afterwards.
    num_new_tokens: i32[num_seqs]; see `page_table.append`.
    order: i32[num_seqs]; see `page_table.append`.
    max_new_tokens: See `page_table.append`.

  Returns:
    The next cache, and `ok` bool[num_seqs], False for refused rows.

  Raises:
    ValueError: See `page_table.append`.
    NotImplementedError: If `cache.implementation` cannot copy pages here.
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
  """Empties rows; see `page_table.release`.

  Args:
    cache: The cache.
    rows: bool[num_seqs], True for rows to empty.

  Returns:
    The next cache.

  Raises:
    ValueError: If `rows` is not bool[num_seqs].
  """
  return cache.with_tables(
    [page_table.release(group.table, rows) for group in cache.groups]
  )


def fork(
  cache: PagedCache,
  src: Int[Array, "*num_forks"] | int,
  dst: Int[Array, "*num_forks"] | int,
) -> tuple[PagedCache, Bool[Array, "*num_forks"]]:
  """Makes empty rows copies of other rows; see `page_table.fork`.

  Args:
    cache: The cache.
    src: i32[num_forks] or i32[], rows to copy; `num_seqs` for no request.
    dst: Rows to fill, in the shape of `src`; `num_seqs` for no request.

  Returns:
    The next cache, and `ok` in the shape of `src`.

  Raises:
    ValueError: See `page_table.fork`.
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
  """Shortens rows; see `page_table.truncate`.

  Args:
    cache: The cache.
    seq: i32[k] or i32[], rows; `num_seqs` for no request.
    new_len: Tokens to keep of each row, in the shape of `seq`.

  Returns:
    The next cache, and `ok` in the shape of `seq`.

  Raises:
    ValueError: See `page_table.truncate`.
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
    seq: i32[k] or i32[], rows; `num_seqs` for no request.
    pages: For each group, i32[k, pages_per_seq] or i32[pages_per_seq].
    kv_len: i32[k] or i32[], number of tokens in the pages of every group.
    min_lens: `min_len` of each group; all 0 if None.

  Returns:
    The next cache, and `ok` in the shape of `seq`.

  Raises:
    ValueError: If `pages` or `min_lens` does not have one entry for each group;
      see also `page_table.adopt`.
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
  """Replaces each row by a fork of an old row; see `page_table.permute`.

  Args:
    cache: The cache.
    parents: i32[num_seqs], the old row that each row becomes; `num_seqs` for an
      empty row.

  Returns:
    The next cache, and `ok` bool[]: if False, no group has changed.

  Raises:
    ValueError: If `parents` is not an integer array of shape [num_seqs].
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
  """Releases the pages that the windows of windowed groups have passed.

  See `page_table.release_outside_window`, also for when to call it.

  Args:
    cache: The cache.
    num_sink_tokens: First tokens that stay visible, at least 0.

  Returns:
    The next cache.

  Raises:
    ValueError: If `num_sink_tokens` is negative, or neither an integer nor an
      i32[] array.
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
  """Changes the tables of all groups, for the requests that all groups serve.

  Args:
    cache: The cache.
    change: Called with a table, its group, and bool[k], the requests to keep;
      None keeps all.
  """
  numbered = list(enumerate(group.table for group in cache.groups))
  changes = [change(table, i, None) for i, table in numbered]
  ok = functools.reduce(jnp.logical_and, [each.ok for each in changes])
  if len(changes) > 1:
    changes = [change(table, i, ok) for i, table in numbered]
  return cache.with_tables([each.table for each in changes]), ok


def _asked(rows: Array | int, keep: Array | None, nothing: int) -> Array | int:
  """Returns `rows`, with `nothing` for requests that are not kept."""
  return rows if keep is None else jnp.where(keep, jnp.asarray(rows), nothing)
