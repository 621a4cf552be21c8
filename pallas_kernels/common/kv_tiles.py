"""Selects the KV tiles that queries visit and the positions that they see.

The queries are the last tokens of a sequence. The positions of a sequence are
cut into tiles of `block_kv`. With a sliding window, only the tiles of the sink
tokens and the tiles of the window are visited:

  tiles    0   1   2   3   4   5   6   7   8
           sink|....... gap .......|..window     visited: 0 5 6 7 8
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.common.rounding import cdiv


@dataclasses.dataclass(frozen=True)
class VisitedTiles:
  """The visited tiles of a sequence, and the visible positions in them.

  A tree mask covers the new tokens, which are the last tokens of the sequence.
  """

  block_kv: int
  sliding_window: int | None
  num_sink_tokens: int
  kv_len: Array  # one past the position of the last query
  kv_end: Array  # end of the stored positions: kv_len, within the page table
  num_earlier: Array  # query tokens before the last; with a mask, see `visit`
  num_visited: Array  # visited tiles
  gap_start: Array  # first tile that is not visited
  gap: Array  # number of tiles that are not visited
  num_new: Array | None = None  # new tokens; None without a tree mask

  def base(self, i):
    """Returns the first position of the i-th visited tile."""
    return jnp.where(i < self.gap_start, i, i + self.gap) * self.block_kv

  def nth_new(self, positions):
    """Returns the index of the new token at each position; else negative."""
    assert self.num_new is not None  # there is a mask
    return positions - (self.kv_len - self.num_new)

  def sees(self, positions, from_last=0, sees_new=None):
    """Returns a mask of the positions that a query sees.

    Args:
      positions: Positions of keys.
      from_last: Distance of the query from the last token, in tokens.
      sees_new: With a tree mask: whether the query sees the new token at each
        position; ignored at positions of the context.
    """
    end = self.kv_end
    if sees_new is None:
      end = jnp.minimum(end, self.kv_len - from_last)
    return self._select(positions, positions < end, from_last, sees_new)

  def are_seen(self, positions, sees_new=None):
    """Returns a mask of the positions that at least one query sees.

    Args:
      positions: Positions of keys.
      sees_new: See `sees`.
    """
    seen = positions < self.kv_end
    return self._select(positions, seen, self.num_earlier, sees_new)

  def _select(self, positions, seen, from_last, sees_new):
    """Returns `seen` without the positions that window or tree mask hide."""
    in_window = None
    if self.sliding_window is not None:
      first = self.kv_len - from_last - self.sliding_window
      in_window = (positions >= first) | (positions < self.num_sink_tokens)
    if sees_new is not None:
      is_context = self.nth_new(positions) < 0
      if in_window is None:
        in_window = is_context | sees_new
      else:
        in_window = jnp.where(is_context, in_window, sees_new)
    return seen if in_window is None else seen & in_window

  def sees_all(self, base):
    """Returns whether every query sees every position of a tile.

    Args:
      base: First position of the tile.
    """
    end = base + self.block_kv
    last = self.num_earlier if self.num_new is None else self.num_new
    sees = end <= jnp.minimum(self.kv_end, self.kv_len - last)
    if self.sliding_window is None:
      return sees
    in_window = base >= self.kv_len - self.sliding_window
    return sees & (in_window | (end <= self.num_sink_tokens))


def page_ids(
  table_gmem, seq, base, chunks: Iterable[int], *, chunk: int, page_size: int
) -> list[Array]:
  """Reads the page ids of some chunks of a tile from the page table.

  For a chunk past the end of the table, the id is arbitrary: its keys are
  masked.

  Args:
    table_gmem: The page table, in global memory.
    seq: Row of the page table.
    base: First position of the tile.
    chunks: Chunk numbers in the tile.
    chunk: Positions per chunk; a chunk never straddles a page.
    page_size: Positions per page.
  """
  starts = (base + j * chunk for j in chunks)
  columns = [lax.div(start, jnp.int32(page_size)) for start in starts]
  last = table_gmem.shape[1] - 1
  return [table_gmem[seq, jnp.minimum(column, last)] for column in columns]


def mapped_bits(ids: list[Array], num_pages: int) -> Array:
  """Returns a bit mask: bit j is set if the page of the j-th chunk is mapped.

  Args:
    ids: Page id of each chunk of a tile.
    num_pages: Pages in the pool.
  """
  mapped = [(page >= 0) & (page < num_pages) for page in ids]
  bits = [bit.astype(jnp.int32) << j for j, bit in enumerate(mapped)]
  return functools.reduce(jnp.add, bits)


def page_row(page, layer, num_pages: int, num_layers: int):
  """Returns the row of (page, layer) in the flat pool (`PagedKV.flat`).

  Page ids out of range are clipped: their keys are masked.

  Args:
    page: Page id.
    layer: The layer; None if the pool has one layer.
    num_pages: Pages in the pool.
    num_layers: Layers per page.
  """
  page = jnp.clip(page, 0, num_pages - 1)
  return page if layer is None else page * num_layers + layer


def visit(
  kv_len: Array,
  num_earlier: Array,
  num_new: Array | None = None,
  *,
  capacity: int,
  block_kv: int,
  sliding_window: int | None,
  num_sink_tokens: int,
) -> VisitedTiles:
  """Returns the tiles that the queries of sequences visit.

  Args:
    kv_len: i32, of any shape: tokens of a sequence, its queries at the end.
    num_earlier: i32, of the same shape: query tokens before the last one. With
      a tree mask, the maximum `unseen` of the queries (see `tree_bits`).
    num_new: New tokens, which the tree mask covers; None without a mask.
    capacity: Positions that a row of the page table has room for.
    block_kv: Positions per tile.
    sliding_window: Positions in the window of a query, or None.
    num_sink_tokens: Leading positions that stay visible outside the window.
  """
  kv_end = jnp.clip(kv_len, 0, capacity)
  num_tiles = lax.div(kv_end + (block_kv - 1), jnp.int32(block_kv))
  gap_start = gap = jnp.zeros_like(kv_end)
  if sliding_window is not None:
    gap_start = jnp.minimum(num_tiles, cdiv(num_sink_tokens, block_kv))
    window_start = jnp.maximum(kv_len - num_earlier - sliding_window, 0)
    gap_end = lax.div(window_start, jnp.int32(block_kv))
    gap = jnp.clip(gap_end - gap_start, 0, num_tiles - gap_start)
  return VisitedTiles(
    block_kv=block_kv,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    kv_len=kv_len,
    kv_end=kv_end,
    num_earlier=num_earlier,
    num_visited=num_tiles - gap,
    gap_start=gap_start,
    gap=gap,
    num_new=num_new,
  )
