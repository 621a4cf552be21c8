"""Decode: supported shapes, tile sizes, bytes of shared memory.

Imports no Pallas.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import gpu, limits
from pallas_kernels.common.limits import SM_SMEM, SMEM_ALLOCATION
from pallas_kernels.common.rounding import round_up

_MAX_QUERIES = 64  # queries per item, limited by the registers of accumulators
_MAX_ELEMENTS = 8192  # elements of Q per item; shared memory has 4 such buffers
REDUCTION_BYTES = 2048  # bytes of shared memory to reduce over warps


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes and the number of programs.

  Raises:
    ValueError: If a field is out of range.
  """

  block_kv: int  # positions per KV tile
  num_stages: int  # stages of the rings: KV tiles in flight
  num_programs: int  # persistent programs (CTAs)

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
  """Returns a Config from shapes alone, not from lengths.

  `block_kv` depends on head_dim and dtype alone. The order in which keys are
  folded therefore does not depend on the number of items.

  Args:
    num_items: Number of sequences times number of KV heads.
    num_queries: Queries per item.
    head_dim: Elements per head.
    dtype: Dtype of the pool.
    device: The GPU to size for; the default device if None.
  """
  num_sms = (device or gpu.default_gpu()).num_sms
  shapes = num_queries, head_dim, dtype
  if limits.is_quantised(dtype):
    # A second program hides the latency of dequantisation. With head_dim > 128
    # there are not enough registers for it.
    per_sm = 2 if head_dim <= 128 else 1
    for num_stages in (4, 3, 2):
      config = Config(64, num_stages, per_sm * num_sms)
      if programs_per_sm(config, *shapes) >= per_sm:
        return config
    return Config(64, 2, num_sms)
  block_kv = 128 if head_dim <= 64 else 64
  # About 100 KB in flight per multiprocessor are best: with twice as much,
  # reads take 2 % longer (H200). With many items, two programs hide the ends of
  # items better; with few items, one program writes fewer partials.
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
  """Returns how many programs fit into the shared memory of a multiprocessor.

  Args:
    config: Tile sizes.
    num_queries: Queries per item.
    head_dim: Elements per head.
    dtype: Dtype of the pages.
  """
  needed = smem_bytes(config, num_queries, head_dim, dtype)
  return SM_SMEM // (needed + SMEM_ALLOCATION)


def smem_bytes(
  config: Config, num_queries: int, head_dim: int, kv_dtype: DTypeLike
) -> int:
  """Returns the bytes of shared memory that one program uses.

  Args:
    config: Tile sizes.
    num_queries: Queries per item, of 16-bit elements.
    head_dim: Elements per head.
    kv_dtype: Dtype of the pages.
  """
  itemsize = jnp.dtype(kv_dtype).itemsize
  queries = padded_queries(num_queries) * head_dim * 2
  ring = config.num_stages * config.block_kv
  buffers = [
    queries,  # Q as copied
    queries,  # Q in tiles for wgmma
    ring * head_dim * itemsize,  # K
    ring * head_dim * itemsize,  # V
    padded_queries(num_queries) * config.block_kv * 2,  # P
    queries,  # O
    queries,  # O, transposed
    REDUCTION_BYTES,
  ]
  if limits.is_quantised(kv_dtype):
    buffers += [ring * 4, ring * 4]  # scales
  barriers = 8 * (2 + 4 * config.num_stages)
  return sum(round_up(b, SMEM_ALLOCATION) for b in buffers) + barriers


def padded_queries(num_queries: int) -> int:
  """Returns the columns of a tile: wgmma needs a multiple of 8.

  Args:
    num_queries: Queries per item.
  """
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
  """Returns why the decode kernel does not support these shapes, or None.

  Args:
    head_dim: Elements per head.
    page_size: Tokens per page.
    num_q_heads: Number of query heads.
    num_kv_heads: Number of KV heads.
    dtype: Dtype of the queries.
    kv_dtype: Dtype of the pages; None: that of the queries.
    max_q_len: Query tokens per sequence, at most.
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
    return f"{queries} with {head_dim=} exceed shared memory."
  return None
