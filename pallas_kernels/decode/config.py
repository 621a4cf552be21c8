"""Sizes of the decode kernel: what it takes, and how it is tiled."""

import dataclasses

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import gpu

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SMEM_LIMIT = 232_448  # bytes a program may have on Hopper
SM_SMEM = 233_472  # bytes of a multiprocessor, for all its programs
QUANTISED_DTYPES = ("int8", "float8_e4m3fn")  # of pages that have scales
MAX_Q_LEN = 8  # query tokens of a sequence
_MAX_QUERIES = 64  # of an item, which the accumulators have room for
_MAX_ELEMENTS = 8192  # of them, in four places of shared memory
_ALLOCATION = 1024  # bytes: shared memory is handed out in these
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
    num_queries: queries of each of them.
    head_dim: width of a head.
    dtype: of the pool.
    device: the GPU; that at hand if None.
  """
  num_sms = (device or gpu.at_hand()).num_sms
  shapes = num_queries, head_dim, dtype
  if is_quantised(dtype):
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
  return SM_SMEM // (needed + _ALLOCATION)


def smem_bytes(
  config: Config, num_queries: int, head_dim: int, kv_dtype: DTypeLike
) -> int:
  """Returns the bytes of shared memory that one program takes.

  Args:
    config: the tiles.
    num_queries: queries of an item, of 16 bits.
    head_dim: width of a head.
    kv_dtype: of the pages.
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
  if is_quantised(kv_dtype):
    buffers += [ring * 4, ring * 4]  # scales
  barriers = 8 * (2 + 4 * config.num_stages)
  return sum(pl.cdiv(b, _ALLOCATION) * _ALLOCATION for b in buffers) + barriers


def is_quantised(dtype: DTypeLike) -> bool:
  """Returns whether pages of this dtype have scales."""
  return jnp.dtype(dtype).name in QUANTISED_DTYPES


def padded_queries(num_queries: int) -> int:
  """Returns the columns for queries of an item: wgmma takes them by eight."""
  return pl.cdiv(num_queries, 8) * 8


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
    head_dim: width of a head.
    page_size: tokens of a page.
    num_q_heads: query heads.
    num_kv_heads: KV heads.
    dtype: of the queries.
    kv_dtype: of the pages; None if it is the same.
    max_q_len: most query tokens of a sequence.
  """
  shape = head_dim, page_size, num_q_heads, num_kv_heads
  if reason := unsupported_shape(*shape, dtype, kv_dtype or dtype):
    return reason
  if not 1 <= max_q_len <= MAX_Q_LEN:
    return f"{max_q_len=} is not in [1, {MAX_Q_LEN}]."
  group = num_q_heads // num_kv_heads
  queries = f"{max_q_len=} tokens of {group=} query heads a KV head"
  if group * max_q_len > _MAX_QUERIES:
    return f"{queries} are more than {_MAX_QUERIES}."
  if padded_queries(group * max_q_len) * head_dim > _MAX_ELEMENTS:
    return f"{queries}, of {head_dim=}, pass shared memory."
  return None


def unsupported_shape(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  kv_dtype: DTypeLike,
) -> str | None:
  """Returns why no kernel of attention takes these, or None; `unsupported`."""
  names = [jnp.dtype(x).name for x in (dtype, kv_dtype)]
  if names[0] not in ("bfloat16", "float16"):
    return f"dtype={names[0]} is not bfloat16 or float16."
  if names[1] not in (names[0], *QUANTISED_DTYPES):
    return f"pages of {names[1]} do not take queries of {names[0]}."
  if head_dim not in HEAD_DIMS:
    return f"{head_dim=} is not one of {HEAD_DIMS}."
  if page_size < 1 or page_size % 8:
    return f"{page_size=} is not a multiple of 8."
  if num_q_heads % num_kv_heads:
    return f"{num_q_heads=} is not a multiple of {num_kv_heads=}."
  return None
