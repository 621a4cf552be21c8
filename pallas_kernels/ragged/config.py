"""Ragged: supported shapes, tile sizes, registers, bytes of shared memory.

Imports no Pallas.
"""

import dataclasses

from jax.typing import DTypeLike

from pallas_kernels.common import gpu, limits
from pallas_kernels.common.limits import SMEM_ALLOCATION, SMEM_LIMIT
from pallas_kernels.common.rounding import next_power_of_two, round_up
from pallas_kernels.common.swizzle import swizzle_bytes

ROWS = 64  # query rows per consumer warpgroup: M of wgmma
_ITEMSIZE = 2  # bytes of bfloat16 and float16
_SPLIT_BELOW = 0.75  # items per program; below that, splitting items is faster
_MAX_GROUP = 128  # query heads per KV head, at most: rows of a query tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes and the number of programs.

  Raises:
    ValueError: If a field is out of range.
  """

  block_kv: int  # positions per KV tile
  num_stages: int  # stages of the rings of K and V: KV tiles in flight
  num_compute_wgs: int = 2  # consumer warpgroups, of 64 query rows each
  num_programs: int = gpu.Gpu.num_sms  # persistent programs (CTAs)
  num_q_stages: int = 1  # stages of the ring of Q
  # Whether items are split so that all programs attend the same number of KV
  # tiles, at the price of partials.
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
    """Rows per query tile."""
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
  """Returns a Config from shapes alone, not from lengths.

  Args:
    num_tokens: Number of query tokens.
    num_kv_heads: Number of KV heads.
    group: Query heads per KV head, padded.
    head_dim: Elements per head.
    is_quantised: Whether pages hold 8-bit elements.
    device: The GPU to size for; the default device if None.
  """
  num_sms = (device or gpu.default_gpu()).num_sms
  block_kv = 128 if head_dim <= 128 else 64
  config = Config(block_kv, 2, num_programs=num_sms)
  double_buffered = dataclasses.replace(config, num_q_stages=2)
  if smem_bytes(double_buffered, head_dim, is_quantised) <= SMEM_LIMIT:
    config = double_buffered
  num_items = num_tokens * group * num_kv_heads / config.block_q
  return dataclasses.replace(config, splits=num_items < _SPLIT_BELOW * num_sms)


def registers(
  config: Config, head_dim: int, is_quantised: bool = False
) -> tuple[int, int]:
  """Returns the registers per thread of a consumer and of the producer.

  A program starts with 65,536 registers divided by its threads, rounded down to
  a multiple of 8: 168 per thread with three warpgroups, 128 with four. Asking
  for more than the program holds deadlocks. The compiler does not spill with
  these counts.

  Args:
    config: Tile sizes.
    head_dim: Elements per head.
    is_quantised: Whether pages hold 8-bit elements.
  """
  if config.num_compute_wgs == 3:
    return 160, 32
  if is_quantised:
    return (216, 72) if head_dim <= 192 else (224, 56)
  return (224, 56) if head_dim <= 128 else (232, 40)


def smem_bytes(
  config: Config, head_dim: int, is_quantised: bool = False
) -> int:
  """Returns the bytes of shared memory that a program uses.

  Args:
    config: Tile sizes.
    head_dim: Elements per head.
    is_quantised: Whether pages hold 8-bit elements.
  """
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
    staged * head_dim,  # 8-bit elements
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
  """Returns the number of staged slices of 8-bit tiles, and the rows of each.

  Four slices are a tile of K and a tile of V.
  """
  num_staged = (4 if head_dim <= 192 else 2) if is_quantised else 0
  return num_staged, config.block_kv // 2


def output_columns(head_dim: int, is_quantised: bool = False) -> int:
  """Returns the columns of the output that shared memory holds at once."""
  if head_dim <= 192:
    return head_dim
  return head_dim // (4 if is_quantised else 2)


def operand_swizzle(head_dim: int) -> int:
  """Returns the width of a wgmma tile in shared memory, in bytes."""
  swizzle = swizzle_bytes(head_dim * _ITEMSIZE)
  assert swizzle is not None  # head_dim is a multiple of 16
  return swizzle


def padded_group(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
  """Returns the rows per token of a query tile: the padded group.

  The group is the number of query heads per KV head. The padding makes it a
  power of two, and aligns the rows of each token to 128 bytes in a column of
  tiles, as TMA requires.

  Args:
    num_q_heads: Number of query heads.
    num_kv_heads: Number of KV heads.
    head_dim: Elements per head.
  """
  group = next_power_of_two(num_q_heads // num_kv_heads)
  return max(group, 128 // operand_swizzle(head_dim))


def unsupported(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
  *,
  kv_dtype: DTypeLike | None = None,
) -> str | None:
  """Returns why the ragged kernel does not support these shapes, or None.

  Args:
    head_dim: Elements per head.
    page_size: Tokens per page.
    num_q_heads: Number of query heads.
    num_kv_heads: Number of KV heads.
    dtype: Dtype of the queries.
    kv_dtype: Dtype of the pages; None: that of the queries.
  """
  shape = head_dim, page_size, num_q_heads, num_kv_heads
  if reason := limits.unsupported_shape(*shape, dtype, kv_dtype or dtype):
    return reason
  group = num_q_heads // num_kv_heads
  if group > _MAX_GROUP:
    return f"{group=} query heads a KV head are more than {_MAX_GROUP}."
  return None
