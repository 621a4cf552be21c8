"""Ragged: which shapes the kernel takes, and how it is tiled.

Imports no Pallas.
"""

import dataclasses

from jax.typing import DTypeLike

from pallas_kernels.common import gpu, limits
from pallas_kernels.common.limits import SMEM_ALLOCATION, SMEM_LIMIT
from pallas_kernels.common.rounding import next_power_of_two, round_up

ROWS = 64  # of a compute warpgroup: what wgmma takes
_ITEMSIZE = 2  # of bfloat16 and float16
_FEW = 0.75  # items for each program, below which splitting pays
_MAX_GROUP = 128  # query heads of a KV head: rows of a tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the kernel, and how many programs share the items."""

  block_kv: int  # positions in a tile
  num_stages: int  # tiles in flight
  num_compute_wgs: int = 2  # warpgroups, of 64 rows each
  num_programs: int = gpu.Gpu.num_sms  # that share all items
  num_q_stages: int = 1  # tiles of queries in flight
  # Whether items may be split to give all programs the same number of tiles,
  # at the price of partials.
  splits: bool = False
  p_in_smem: bool = False  # whether P goes through shared memory

  def __post_init__(self):
    if self.block_kv not in (64, 128):
      raise ValueError(f"{self.block_kv=} must be 64 or 128.")
    if self.num_stages < 2:
      raise ValueError(f"{self.num_stages=} must be at least 2.")
    if self.num_q_stages not in (1, 2):
      raise ValueError(f"{self.num_q_stages=} must be 1 or 2.")
    if self.num_compute_wgs not in (1, 2, 3):
      raise ValueError(f"{self.num_compute_wgs=} must be 1, 2 or 3.")
    if self.num_programs < 1:
      raise ValueError(f"{self.num_programs=} must be at least 1.")

  @property
  def block_q(self) -> int:
    """Rows of a tile of queries."""
    return ROWS * self.num_compute_wgs


def default_config(
  num_tokens: int,
  num_kv_heads: int,
  group: int,
  head_dim: int,
  *,
  is_quantised: bool = False,
  device: gpu.Gpu | None = None,
) -> Config:
  """Returns a good Config for these shapes; it does not depend on lengths.

  Args:
    num_tokens: Query tokens.
    num_kv_heads: KV heads.
    group: Query heads of a KV head, padded.
    head_dim: Width of a head.
    is_quantised: Whether pages hold 8-bit numbers.
    device: The GPU; that at hand if None.
  """
  num_sms = (device or gpu.at_hand()).num_sms
  block_kv = 128 if head_dim <= 128 else 64
  config = Config(block_kv, 2, num_programs=num_sms)
  ahead = dataclasses.replace(config, num_q_stages=2)
  if smem_bytes(ahead, head_dim, is_quantised) <= SMEM_LIMIT:
    config = ahead
  num_items = num_tokens * group * num_kv_heads / config.block_q
  return dataclasses.replace(config, splits=num_items < _FEW * num_sms)


def registers(
  config: Config, head_dim: int, is_quantised: bool = False
) -> tuple[int, int]:
  """Returns the registers of a thread that computes, and of one for memory.

  A program starts with 65,536 over its threads for each, a multiple of 8: 168
  for three warpgroups, 128 for four. Asking for more than the program holds
  deadlocks. The counts are those at which the compiler does not spill.
  """
  if config.num_compute_wgs == 3:
    return 160, 32
  if is_quantised:
    return (216, 72) if head_dim <= 192 else (224, 56)
  return (224, 56) if head_dim <= 128 else (232, 40)


def smem_bytes(
  config: Config, head_dim: int, is_quantised: bool = False
) -> int:
  """Returns the bytes of shared memory that a program takes."""
  ring = config.num_stages * config.block_kv * _ITEMSIZE
  columns = output_columns(head_dim, is_quantised)
  num_staged, staged_rows = staging(config, head_dim, is_quantised)
  staged = num_staged * staged_rows
  buffers = [
    config.num_q_stages * config.block_q * head_dim * _ITEMSIZE,  # Q
    config.block_q * columns * _ITEMSIZE,  # O
    ring * head_dim,  # K
    ring * head_dim,  # V
    config.block_q * config.block_kv * _ITEMSIZE * config.p_in_smem,  # P
    staged * head_dim,  # 8-bit numbers
    staged * 4,  # their scales
  ]
  num_barriers = 2 * config.num_q_stages + 4 * config.num_stages + num_staged
  if config.num_compute_wgs > 1:
    num_barriers += config.num_stages
  buffers = [round_up(b, SMEM_ALLOCATION) for b in buffers]
  return sum(buffers) + 8 * num_barriers


def staging(
  config: Config, head_dim: int, is_quantised: bool = True
) -> tuple[int, int]:
  """Returns how many pieces of tiles are on their way to be widened.

  And how many rows each has. Four are a tile of K and one of V.
  """
  num_staged = (4 if head_dim <= 192 else 2) if is_quantised else 0
  return num_staged, config.block_kv // 2


def output_columns(head_dim: int, is_quantised: bool = False) -> int:
  """Returns the columns of the output that are on their way at once."""
  if head_dim <= 192:
    return head_dim
  return head_dim // (4 if is_quantised else 2)


def swizzle_bytes(head_dim: int) -> int:
  """Returns the width of a tile of shared memory, in bytes."""
  return next(x for x in (128, 64, 32) if head_dim * _ITEMSIZE % x == 0)


def padded_group(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
  """Returns the rows of a token: its query heads of a KV head, padded.

  To a power of two, and so that they begin where a copy (TMA) may: at multiples
  of 128 bytes in a column of tiles.
  """
  group = next_power_of_two(num_q_heads // num_kv_heads)
  return max(group, 128 // swizzle_bytes(head_dim))


def unsupported(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  *,
  kv_dtype: DTypeLike | None = None,
) -> str | None:
  """Returns why the kernel does not take these shapes, or None if it does.

  Args:
    head_dim: Width of a head.
    page_size: Tokens of a page.
    num_q_heads: Query heads.
    num_kv_heads: KV heads.
    dtype: Of the queries.
    kv_dtype: Of the pages; None if it is the same.
  """
  shape = head_dim, page_size, num_q_heads, num_kv_heads
  if reason := limits.unsupported_shape(*shape, dtype, kv_dtype or dtype):
    return reason
  group = num_q_heads // num_kv_heads
  if group > _MAX_GROUP:
    return f"{group=} query heads a KV head are more than {_MAX_GROUP}."
  return None
