"""Which KV tiles the queries at the end of a sequence visit, and see.

A sequence's positions fall into tiles of `block_kv`. With a sliding window,
only the tiles of the sink tokens and those of the window are visited:

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
  """The visited tiles of sequences, and which of their positions count."""

  block_kv: int
  sliding_window: int | None
  num_sink_tokens: int
  kv_len: Array  # one past the position of the last query
  kv_end: Array  # positions from it on do not exist
  num_earlier: Array  # queries before the last
  num_visited: Array
  gap_start: Array  # first tile that is not visited
  gap: Array  # tiles that are not visited
  # Last tokens, of which a mask tells what is seen; None without a mask.
  num_new: Array | None = None

  def base(self, i):
    """Returns the first position of the i-th visited tile."""
    return jnp.where(i < self.gap_start, i, i + self.gap) * self.block_kv

  def nth_new(self, positions):
    """Returns which of the new tokens are at positions, negative for others."""
    assert self.num_new is not None  # there is a mask
    return positions - (self.kv_len - self.num_new)

  def sees(self, positions, from_last=0, sees_new=None):
    """Returns which positions a query sees.

    Args:
      positions: Of keys.
      from_last: How many tokens before the last the query stands.
      sees_new: With a mask, whether the query sees the new tokens there.
    """
    end = self.kv_end
    if sees_new is None:
      end = jnp.minimum(end, self.kv_len - from_last)
    return self._select(positions, positions < end, from_last, sees_new)

  def are_seen(self, positions, sees_new=None):
    """Returns which positions some query sees; see `sees`."""
    seen = positions < self.kv_end
    return self._select(positions, seen, self.num_earlier, sees_new)

  def _select(self, positions, seen, from_last, sees_new):
    """Removes from `seen` what the window and the mask hide."""
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
    """Returns whether every query sees every position of the tile at base."""
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
  """Returns the pages of chunks of the tile at a position, in a kernel.

  Past the table's end, it is any page: its keys are masked.

  Args:
    table_gmem: The page table, in global memory.
    seq: The sequence.
    base: The position.
    chunks: Which chunks of the tile.
    chunk: Positions of a chunk, which are of one page.
    page_size: Positions of a page.
  """
  starts = (base + j * chunk for j in chunks)
  columns = [lax.div(start, jnp.int32(page_size)) for start in starts]
  last = table_gmem.shape[1] - 1
  return [table_gmem[seq, jnp.minimum(column, last)] for column in columns]


def mapped_bits(ids: list[Array], num_pages: int) -> Array:
  """Returns a bit per chunk of a tile: whether its page is mapped.

  Args:
    ids: The page of each chunk.
    num_pages: Pages of the pool.
  """
  mapped = [(page >= 0) & (page < num_pages) for page in ids]
  bits = [bit.astype(jnp.int32) << j for j, bit in enumerate(mapped)]
  return functools.reduce(jnp.add, bits)


def page_row(page, layer, num_pages: int, num_layers: int):
  """Returns the row of a page of a layer in the pool seen flat.

  A page out of range gives some other row: its keys are masked.

  Args:
    page: The page.
    layer: The layer; None if the pool has one.
    num_pages: Pages of the pool.
    num_layers: Layers of a page.
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
  """Returns the tiles that queries visit.

  Args:
    kv_len: i32, of any shape: tokens of a sequence; its queries are the last.
    num_earlier: Queries before the last one, of the same shape; or with a mask,
      see `tree_bits`.
    num_new: Last tokens, of which a mask tells what is seen, or None.
    capacity: Positions that the page table has room for, and most tokens.
    block_kv: Positions of a tile.
    sliding_window: Positions that the query sees, or None.
    num_sink_tokens: First positions that it sees besides.
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
