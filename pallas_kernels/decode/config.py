"""Decode: which shapes the kernel takes, and how it is tiled.

Imports no Pallas.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import gpu, limits
from pallas_kernels.common.limits import SM_SMEM, SMEM_ALLOCATION
from pallas_kernels.common.rounding import round_up

_MAX_QUERIES = 64  # of an item, which the accumulators have room for
_MAX_ELEMENTS = 8192  # of them, in four places of shared memory
REDUCTION_BYTES = 2048  # bytes of scratch to reduce over warps


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the kernel, and how many programs share the tiles."""

  block_kv: int  # positions in a tile
  num_stages: int  # tiles in flight
  num_programs: int  # that share all tiles

  def __post_init__(self):
    if self.block_kv not in (64, 128):
      raise ValueError(f"{self.block_kv=} must be 64 or 128.")
    if self.num_stages < 2:
      raise ValueError(f"{self.num_stages=} must be at least 2.")
    if self.num_programs < 1:
      raise ValueError(f"{self.num_programs=} must be at least 1.")


def default_config(
  num_items: int,
  num_queries: int,
  head_dim: int,
  dtype: DTypeLike,
  *,
  device: gpu.Gpu | None = None,
) -> Config:
  """Returns a good Config for these shapes; it does not depend on lengths.

  Its tiles depend on the width and the dtype alone, so that the order in which
  keys are folded does not depend on the number of items.

  Args:
    num_items: KV heads of all sequences.
    num_queries: Queries of each of them.
    head_dim: Width of a head.
    dtype: Of the pool.
    device: The GPU; that at hand if None.
  """
  num_sms = (device or gpu.at_hand()).num_sms
  shapes = num_queries, head_dim, dtype
  if limits.is_quantised(dtype):
    # What it takes to widen numbers is hidden by another program; wider heads
    # leave it no registers.
    per_sm = 2 if head_dim <= 128 else 1
    for num_stages in (4, 3, 2):
      config = Config(64, num_stages, per_sm * num_sms)
      if programs_per_sm(config, *shapes) >= per_sm:
        return config
    return Config(64, 2, num_sms)
  block_kv = 128 if head_dim <= 64 else 64
  # About 100 KB in flight on a multiprocessor are best: with twice as much,
  # reads take 2 % longer (H200). Many items hide their ends better in two
  # programs; few leave fewer partials in one.
  config = Config(block_kv, 2, 2 * num_sms)
  if num_items >= 2 * num_sms and programs_per_sm(config, *shapes) >= 2:
    return config
  config = Config(block_kv, 3, num_sms)
  if programs_per_sm(config, *shapes):
    return config
  return dataclasses.replace(config, num_stages=2)


def programs_per_sm(
  config: Config, num_queries: int, head_dim: int, dtype: DTypeLike
) -> int:
  """Returns how many programs a multiprocessor has shared memory for."""
  needed = smem_bytes(config, num_queries, head_dim, dtype)
  return SM_SMEM // (needed + SMEM_ALLOCATION)


def smem_bytes(
  config: Config, num_queries: int, head_dim: int, kv_dtype: DTypeLike
) -> int:
  """Returns the bytes of shared memory that one program takes.

  Args:
    config: The tiles.
    num_queries: Queries of an item, of 16 bits.
    head_dim: Width of a head.
    kv_dtype: Of the pages.
  """
  itemsize = jnp.dtype(kv_dtype).itemsize
  queries = padded_queries(num_queries) * head_dim * 2
  ring = config.num_stages * config.block_kv
  buffers = [
    queries,  # Q as it comes
    queries,  # Q in tiles
    ring * head_dim * itemsize,  # K
    ring * head_dim * itemsize,  # V
    padded_queries(num_queries) * config.block_kv * 2,  # P
    queries,  # O
    queries,  # O, turned
    REDUCTION_BYTES,
  ]
  if limits.is_quantised(kv_dtype):
    buffers += [ring * 4, ring * 4]  # scales
  barriers = 8 * (2 + 4 * config.num_stages)
  return sum(round_up(b, SMEM_ALLOCATION) for b in buffers) + barriers


def padded_queries(num_queries: int) -> int:
  """Returns the columns for queries of an item: wgmma takes them by eight."""
  return round_up(num_queries, 8)


def unsupported(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  *,
  kv_dtype: DTypeLike | None = None,
  max_q_len: int = 1,
) -> str | None:
  """Returns why the kernel does not take these shapes, or None if it does.

  Args:
    head_dim: Width of a head.
    page_size: Tokens of a page.
    num_q_heads: Query heads.
    num_kv_heads: KV heads.
    dtype: Of the queries.
    kv_dtype: Of the pages; None if it is the same.
    max_q_len: Most query tokens of a sequence.
  """
  shape = head_dim, page_size, num_q_heads, num_kv_heads
  if reason := limits.unsupported_shape(*shape, dtype, kv_dtype or dtype):
    return reason
  if not 1 <= max_q_len <= limits.MAX_Q_LEN:
    return f"{max_q_len=} is not in [1, {limits.MAX_Q_LEN}]."
  group = num_q_heads // num_kv_heads
  queries = f"{max_q_len=} tokens of {group=} query heads a KV head"
  if group * max_q_len > _MAX_QUERIES:
    return f"{queries} are more than {_MAX_QUERIES}."
  if padded_queries(group * max_q_len) * head_dim > _MAX_ELEMENTS:
    return f"{queries}, of {head_dim=}, pass shared memory."
  return None
