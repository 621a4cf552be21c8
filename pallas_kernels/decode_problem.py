"""What is static about a launch of the decode kernel, and its memory."""

import dataclasses
import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import kv_tiles, partials
from pallas_kernels.decode_config import (
  SMEM_LIMIT,
  Config,
  padded_queries,
  smem_bytes,
)

_SWIZZLES = (128, 64, 32)  # bytes: widths of a tile in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is static about a launch."""

  config: Config
  dtype: DTypeLike
  num_seqs: int
  num_kv_heads: int
  group: int  # query heads of a KV head
  max_q_len: int  # query tokens of a sequence
  head_dim: int
  num_pages: int
  page_size: int
  pages_per_seq: int
  scale: float
  sliding_window: int | None
  num_sink_tokens: int
  logits_soft_cap: float | None
  has_sinks: bool
  interpret: plgpu.InterpretGPUParams | None

  def __post_init__(self):
    needed = smem_bytes(self.config, self.num_rows, self.head_dim, self.dtype)
    if needed > SMEM_LIMIT:
      raise ValueError(f"{self.config=} takes {needed} bytes > {SMEM_LIMIT=}.")

  @property
  def chunk(self) -> int:
    """Positions of a tile that one copy brings."""
    return math.gcd(self.page_size, self.config.block_kv)

  @property
  def num_chunks(self) -> int:
    """Copies of a tile."""
    return self.config.block_kv // self.chunk

  @property
  def num_rows(self) -> int:
    """Rows of Q of an item."""
    return self.group * self.max_q_len

  @property
  def num_queries(self) -> int:
    """The same, padded: columns of a tile."""
    return padded_queries(self.num_rows)

  @property
  def loads_tiles_of_q(self) -> bool:
    """Whether Q comes in tiles already, padded by XLA.

    Otherwise its rows come as they are, and registers put them in tiles; these
    take rows of Q^T by 64.
    """
    return self.head_dim % 64 != 0

  def visit(self, kv_len, q_len=None) -> kv_tiles.Tiles:
    """Returns the tiles that sequences of these lengths visit."""
    num_earlier = jnp.zeros_like(kv_len)
    if q_len is not None:
      num_earlier = jnp.maximum(q_len - 1, 0)
      kv_len = jnp.where(q_len > 0, kv_len, 0)
    return kv_tiles.visit(
      kv_len,
      num_earlier,
      capacity=self.pages_per_seq * self.page_size,
      block_kv=self.config.block_kv,
      sliding_window=self.sliding_window,
      num_sink_tokens=self.num_sink_tokens,
    )

  def pad_queries(self, x):
    """Pads an axis of the queries of an item, the second."""
    padding = [(0, 0)] * x.ndim
    padding[1] = 0, self.num_queries - self.num_rows
    return jnp.pad(x, padding)


def _swizzled(dtype: DTypeLike, width: int, *shape: int):
  """Returns shared memory in tiles for wgmma, for rows of some width."""
  itemsize = jnp.dtype(dtype).itemsize
  swizzle = next(x for x in _SWIZZLES if width * itemsize % x == 0)
  transforms = (
    plgpu.TilingTransform((8, swizzle // itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(problem: Problem) -> dict[str, Any]:
  """Returns the shared memory and the barriers of a program."""
  config, dtype, head_dim = problem.config, problem.dtype, problem.head_dim
  swizzled = functools.partial(_swizzled, dtype, head_dim)
  barriers = functools.partial(plgpu.Barrier, num_barriers=config.num_stages)
  return {
    "loaded_q_smem": plgpu.SMEM((problem.num_queries, head_dim), dtype),
    "q_smem": swizzled(problem.num_queries, head_dim),
    "k_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "v_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "p_smem": swizzled(problem.num_queries, config.block_kv),
    **partials.output_scratch(head_dim, problem.num_queries, dtype),
    "q_loaded": plgpu.Barrier(),
    "q_consumed": plgpu.Barrier(),
    "k_loaded": barriers(num_arrivals=problem.num_chunks),
    "v_loaded": barriers(num_arrivals=problem.num_chunks),
    "k_consumed": barriers(),
    "v_consumed": barriers(),
  }
