"""Split-KV: deals the KV tiles of a sequence to programs, merges the results.

A sequence's positions fall into tiles of `block_kv`. With a sliding window,
only the tiles of the sink tokens and those of the window are visited:

  tiles    0   1   2   3   4   5   6   7   8     3 splits: [0 5] [6 7] [8]
           sink|....... gap .......|..window
"""

import dataclasses
import math

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)


def max_tiles(
  capacity: int, block_kv: int, sliding_window: int | None, num_sink_tokens: int
) -> int:
  """Returns how many tiles a query visits at most."""
  tiles = pl.cdiv(capacity, block_kv)
  if sliding_window is None:
    return tiles
  # A window that is not aligned with the tiles touches one more.
  in_window = pl.cdiv(sliding_window, block_kv) + 1
  return min(tiles, in_window + pl.cdiv(num_sink_tokens, block_kv))


def num_splits(num_programs: int, max_tiles: int, num_sms: int) -> int:
  """Returns the fewest splits that keep the device busy.

  That is two waves of programs, the last one nearly full: one sequence of
  128k tokens and 8 KV heads took 146 us with 33 splits, 155 with 66, and 167
  with 132 (H200).

  Args:
    num_programs: programs without splitting.
    max_tiles: tiles of the longest sequence; a split gets two at least.
    num_sms: multiprocessors of the device, with a program each at a time.
  """
  most = max(1, max_tiles // 2)
  for splits in range(1, most):
    waves = num_programs * splits / num_sms
    if waves > 1.9 and waves / math.ceil(waves) > 0.9:
      return splits
  return most


@dataclasses.dataclass(frozen=True)
class Share:
  """The tiles that one split visits, and which of their positions count."""

  block_kv: int
  sliding_window: int | None
  num_sink_tokens: int
  kv_end: ArrayLike  # positions from it on do not exist
  window_start: ArrayLike  # positions from it on are in the window
  first_tile: ArrayLike  # counts visited tiles
  num_tiles: ArrayLike
  gap_start: ArrayLike  # first tile that is not visited
  gap: ArrayLike  # tiles that are not visited

  def base(self, i):
    """Returns the first position of the split's i-th tile."""
    tile = self.first_tile + i
    tile = jnp.where(tile < self.gap_start, tile, tile + self.gap)
    return tile * self.block_kv

  def sees(self, positions):
    """Tells which positions are below the length and in the window."""
    sees = positions < self.kv_end
    if self.sliding_window is None:
      return sees
    in_window = positions >= self.window_start
    return sees & (in_window | (positions < self.num_sink_tokens))

  def sees_all(self, base):
    """Tells whether every position of the tile at base is seen."""
    end = base + self.block_kv
    sees = end <= self.kv_end
    if self.sliding_window is None:
      return sees
    in_window = base >= self.window_start
    return sees & (in_window | (end <= self.num_sink_tokens))


def share_of(
  split,
  kv_len,
  *,
  num_splits: int,
  capacity: int,
  block_kv: int,
  sliding_window: int | None,
  num_sink_tokens: int,
) -> Share:
  """Deals the visited tiles of a sequence evenly to num_splits splits.

  Args:
    split: index of the split, a traced scalar like all that is not static.
    kv_len: tokens of the sequence; the query is the last of them.
    num_splits: splits of every sequence.
    capacity: positions that the page table has room for.
    block_kv: positions of a tile.
    sliding_window: positions that the query sees, or None.
    num_sink_tokens: first positions that it sees besides.
  """
  kv_end = jnp.clip(kv_len, 0, capacity)
  num_tiles = lax.div(kv_end + (block_kv - 1), jnp.int32(block_kv))
  window_start = gap_start = gap = jnp.int32(0)
  if sliding_window is not None:
    window_start = jnp.maximum(kv_len - sliding_window, 0)
    gap_start = jnp.minimum(num_tiles, pl.cdiv(num_sink_tokens, block_kv))
    gap_end = lax.div(window_start, jnp.int32(block_kv))
    gap = jnp.clip(gap_end - gap_start, 0, num_tiles - gap_start)
  visited = num_tiles - gap
  first_tile = lax.div(split * visited, jnp.int32(num_splits))
  end_tile = lax.div((split + 1) * visited, jnp.int32(num_splits))
  return Share(
    block_kv=block_kv,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    kv_end=kv_end,
    window_start=window_start,
    first_tile=first_tile,
    num_tiles=end_tile - first_tile,
    gap_start=gap_start,
    gap=gap,
  )


def merge(
  partials: Float[Array, "num_seqs num_splits num_q_heads head_dim"],
  lses: Float[Array, "num_seqs num_splits num_q_heads"],
  sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[
  Float[Array, "num_seqs num_q_heads head_dim"],
  Float[Array, "num_seqs num_q_heads"],
]:
  """Merges normalised partials, each weighted by 2^lse.

  Args:
    partials: softmax over the keys of one split, 0 where it saw none.
    lses: base-2 log-sum-exp of the split's scores, -inf where it saw none.
    sinks: a logit per head that only the denominator counts, or None.

  Returns:
    The softmax over all keys, and the natural log-sum-exp, sinks included;
    0 and -inf where no split saw a key.
  """
  top = jnp.max(lses, axis=1)
  sees = top > -jnp.inf
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)[None] * LOG2_E
    top = jnp.maximum(top, sinks)
  top = jnp.where(sees, top, 0.0)
  weights = jnp.exp2(lses - top[:, None])
  total = jnp.sum(weights, axis=1)
  if sinks is not None:
    total += jnp.exp2(sinks - top)
  total = jnp.where(sees, total, 1.0)
  out = jnp.sum(partials * weights[..., None], axis=1) / total[..., None]
  lse = jnp.where(sees, (top + jnp.log2(total)) / LOG2_E, -jnp.inf)
  return out, lse
