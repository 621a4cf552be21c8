"""What is static about a launch of the decode kernel, and its memory."""

import dataclasses
import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import kv_tiles, schedule, tree_bits
from pallas_kernels.decode import fragments, partials
from pallas_kernels.decode.config import (
  SMEM_LIMIT,
  Config,
  is_quantised,
  padded_queries,
  smem_bytes,
)

_SWIZZLES = (128, 64, 32)  # bytes: widths of a tile in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is static about a launch."""

  config: Config
  dtype: DTypeLike  # of the queries
  kv_dtype: DTypeLike  # of the pages
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
  has_alibi: bool
  causal: bool
  has_tree: bool
  batch_invariant: bool
  interpret: plgpu.InterpretGPUParams | None

  def __post_init__(self):
    needed = smem_bytes(
      self.config, self.num_rows, self.head_dim, self.kv_dtype
    )
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
  def is_quantised(self) -> bool:
    """Whether pages hold 8-bit numbers, with a scale for each token."""
    return is_quantised(self.kv_dtype)

  @property
  def operand_dtype(self) -> DTypeLike:
    """What wgmma multiplies; float16 holds all 8-bit numbers."""
    return jnp.float16 if self.is_quantised else self.dtype

  def as_operand(self, q):
    """Returns queries in the dtype of the operands."""
    if not self.is_quantised or q.dtype == self.operand_dtype:
      return q
    most = float(jnp.finfo(self.operand_dtype).max)
    q = jnp.clip(q.astype(jnp.float32), -most, most)
    return q.astype(self.operand_dtype)

  @property
  def is_interleaved(self) -> bool:
    """Whether head_dim is in the order of `fragments`, in Q."""
    return self.is_quantised and self.interpret is None

  @property
  def operand_transforms(self) -> tuple[Any, Any]:
    """Returns tiles for wgmma, of 16-bit rows of `head_dim`."""
    swizzle = next(x for x in _SWIZZLES if self.head_dim * 2 % x == 0)
    return (
      plgpu.TilingTransform((8, swizzle // 2)),
      plgpu.SwizzleTransform(swizzle),
    )

  @property
  def max_splits(self) -> int:
    """Parts of an item, at most, in fixed splits."""
    capacity = self.pages_per_seq * self.page_size
    tiles = -(-capacity // self.config.block_kv)
    return min(schedule.MAX_SPLITS, -(-tiles // schedule.LEAST_SPLIT))

  @property
  def num_rows(self) -> int:
    """Rows of Q of an item."""
    return self.group * self.max_q_len

  @property
  def has_q_lens(self) -> bool:
    """Whether sequences differ in their query tokens."""
    return self.max_q_len > 1 or self.has_tree

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

  def visit(self, kv_len, q_len=None, tree=None) -> kv_tiles.Tiles:
    """Returns the tiles that sequences visit.

    Args:
      kv_len: tokens stored.
      q_len: query tokens, if there is not one everywhere.
      tree: words of `tree_bits.Few`, if there is a mask.
    """
    num_earlier = jnp.zeros_like(kv_len)
    if q_len is not None:
      num_earlier = jnp.maximum(q_len - 1, 0)
      kv_len = jnp.where(q_len > 0, kv_len, 0)
    if tree is not None:
      num_earlier = tree_bits.before(tree)
    return kv_tiles.visit(
      kv_len,
      num_earlier,
      None if tree is None else q_len,
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


def scratch(problem: Problem) -> dict[str, Any]:
  """Returns the shared memory and the barriers of a program."""
  config, head_dim = problem.config, problem.head_dim
  ring = config.num_stages, config.block_kv
  barriers = functools.partial(plgpu.Barrier, num_barriers=config.num_stages)
  copies = problem.num_chunks

  def operand(*shape):
    transforms = problem.operand_transforms
    return plgpu.SMEM(shape, problem.operand_dtype, transforms=transforms)

  tiles, more = operand(*ring, head_dim), {}
  if problem.is_quantised:
    transforms = fragments.transforms(head_dim)
    tiles = plgpu.SMEM(
      (*ring, head_dim), problem.kv_dtype, transforms=transforms
    )
    scales = plgpu.SMEM(ring, jnp.float32)
    more |= dict(k_scales_smem=scales, v_scales_smem=scales)
    copies *= 2
  return {
    "loaded_q_smem": plgpu.SMEM((problem.num_queries, head_dim), problem.dtype),
    "q_smem": operand(problem.num_queries, head_dim),
    "k_smem": tiles,
    "v_smem": tiles,
    "p_smem": operand(problem.num_queries, config.block_kv),
    **more,
    **partials.output_scratch(head_dim, problem.num_queries, problem.dtype),
    "q_loaded": plgpu.Barrier(),
    "q_consumed": plgpu.Barrier(),
    "k_loaded": barriers(num_arrivals=copies),
    "v_loaded": barriers(num_arrivals=copies),
    "k_consumed": barriers(),
    "v_consumed": barriers(),
  }
