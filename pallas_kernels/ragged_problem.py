"""What is static about a launch of the ragged kernel, and its memory."""

import dataclasses
import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import kv_tiles, ragged_config, ragged_schedule
from pallas_kernels.decode_config import SMEM_LIMIT
from pallas_kernels.online_softmax import LOG2_E, to_base_2
from pallas_kernels.ragged_config import ROWS, Config

_SWIZZLES = (128, 64, 32)  # bytes: widths of a tile in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is static about a launch."""

  config: Config
  dtype: DTypeLike
  num_tokens: int
  num_seqs: int
  num_kv_heads: int
  group: int  # query heads of a KV head, padded to a power of two
  head_dim: int
  num_pages: int
  page_size: int
  pages_per_seq: int
  scale: float
  sliding_window: int | None
  num_sink_tokens: int
  logits_soft_cap: float | None
  has_sinks: bool
  causal: bool
  interpret: plgpu.InterpretGPUParams | None

  def __post_init__(self):
    needed = ragged_config.smem_bytes(self.config, self.head_dim, self.dtype)
    if needed > SMEM_LIMIT:
      raise ValueError(f"{self.config=} takes {needed} bytes > {SMEM_LIMIT=}.")
    if self.group > self.config.block_q:
      raise ValueError(f"{self.group=} must be at most {self.config.block_q=}.")

  @property
  def chunk(self) -> int:
    """Positions of a tile that one copy brings."""
    return math.gcd(self.page_size, self.config.block_kv)

  @property
  def num_chunks(self) -> int:
    """Copies of a tile."""
    return self.config.block_kv // self.chunk

  @property
  def sizes(self) -> ragged_schedule.Sizes:
    """What is static about the list of items."""
    return ragged_schedule.Sizes(
      num_tokens=self.num_tokens,
      num_seqs=self.num_seqs,
      num_kv_heads=self.num_kv_heads,
      tile_tokens=self.config.block_q // self.group,
      causal=self.causal,
    )

  @property
  def p_in_smem(self) -> bool:
    """Whether P is in shared memory: the interpreter wants it there."""
    return self.config.p_in_smem or self.interpret is not None

  @property
  def factor(self) -> float:
    """What is left to multiply `scores` by, for base 2."""
    in_softmax = self.logits_soft_cap is None and self.scale > 0
    return self.scale * LOG2_E if in_softmax else 1.0

  def scores(self, qk):
    """Returns the scores of products q k, which `factor` takes to base 2."""
    if self.factor != 1.0:
      return qk
    return to_base_2(qk, self.scale, self.logits_soft_cap)

  def visit(self, kv_len, num_earlier) -> kv_tiles.Tiles:
    """Returns the tiles that items visit."""
    return kv_tiles.visit(
      kv_len,
      num_earlier,
      capacity=self.pages_per_seq * self.page_size,
      block_kv=self.config.block_kv,
      sliding_window=self.sliding_window,
      num_sink_tokens=self.num_sink_tokens,
    )


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
  config, head_dim = problem.config, problem.head_dim
  num_wgs = config.num_compute_wgs
  # P has the swizzle of V, as the operands of wgmma must.
  swizzled = functools.partial(_swizzled, problem.dtype, head_dim)
  barriers = functools.partial(plgpu.Barrier, num_barriers=config.num_stages)
  columns = ragged_config.output_columns(head_dim)
  memory = {
    "q_smem": swizzled(num_wgs, ROWS, head_dim),
    "out_smem": swizzled(num_wgs, ROWS, columns),
    "k_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "v_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "q_loaded": plgpu.Barrier(num_arrivals=num_wgs),
    "q_consumed": plgpu.Barrier(num_arrivals=num_wgs),
    "k_loaded": barriers(num_arrivals=problem.num_chunks),
    "v_loaded": barriers(num_arrivals=problem.num_chunks),
    "k_consumed": barriers(num_arrivals=num_wgs),
    "v_consumed": barriers(num_arrivals=num_wgs),
  }
  if problem.p_in_smem:
    memory["p_smem"] = swizzled(num_wgs, ROWS, config.block_kv)
  if num_wgs > 1:
    memory["v_cleaned"] = plgpu.Barrier()
    memory["turn"] = plgpu.Barrier(num_arrivals=num_wgs)
  return memory
