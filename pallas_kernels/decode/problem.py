"""Decode: static sizes, inputs, outputs, shared memory and barriers."""

import dataclasses
import functools
from typing import NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import limits, refs, schedule, tree_bits
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.common.problem import PagedProblem
from pallas_kernels.common.rounding import cdiv
from pallas_kernels.common.swizzle import swizzle_bytes
from pallas_kernels.common.types import ArrayOrRef, Ref
from pallas_kernels.decode import fragments
from pallas_kernels.decode.config import Config, padded_queries, smem_bytes
from pallas_kernels.decode.partials import OutputScratch, Partials


class Inputs(NamedTuple):
  """Arrays in global memory that the kernel reads."""

  splits: schedule.Splits
  page_indices: ArrayOrRef  # i32[num_seqs, pages_per_seq]
  kv_lens: ArrayOrRef  # i32[num_seqs]
  layer: ArrayOrRef | None  # i32[1]; None: the pool has one layer
  q: ArrayOrRef  # [rows, head_dim], see `kernel._rows_of_queries`
  k: KVArrays
  v: KVArrays
  q_lens: ArrayOrRef | None  # i32[num_seqs]; None: one query token each
  tree: tree_bits.Few | None  # i32[num_seqs, num_queries] and i32[num_seqs]
  sinks: ArrayOrRef | None  # f32[num_kv_heads, num_queries], in base 2
  alibi_slopes: ArrayOrRef | None  # f32[num_kv_heads, num_queries], in base 2


class Outputs(NamedTuple):
  """Arrays in global memory that the kernel writes."""

  out: Ref  # [num_seqs, num_kv_heads, num_rows, head_dim]
  lse: Ref  # f32[num_seqs, num_kv_heads, num_queries]
  partials: Partials


class Ring(NamedTuple):
  """A ring of `num_stages` tiles of K or of V in shared memory."""

  consumed: Ref  # barriers, one arrival: the consumer has read the tile
  loaded: Ref  # barriers, one arrival per copy: the tile is in shared memory
  scales: Ref | None  # f32[num_stages, block_kv]
  tiles: Ref  # [num_stages, block_kv, head_dim]


class Scratch(NamedTuple):
  """Shared memory and barriers of a program, in order of address."""

  k: Ring
  q_row_major: Ref  # [num_queries, head_dim], row-major, as copied
  output: OutputScratch
  p: Ref  # [num_queries, block_kv], in tiles for wgmma
  q_consumed: Ref  # barrier: the consumer has read Q
  q_loaded: Ref  # barrier: Q is in shared memory
  q: Ref  # [num_queries, head_dim], in tiles for wgmma
  v: Ring


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeProblem(PagedProblem[Config]):
  """The static sizes and options of a launch of the decode kernel.

  Raises:
    ValueError: If the config exceeds shared memory.
  """

  max_q_len: int  # query tokens per sequence, at most
  has_tree: bool  # whether there is a tree mask

  def __post_init__(self):
    needed = smem_bytes(
      self.config, self.num_rows, self.head_dim, self.kv_dtype
    )
    if needed > limits.SMEM_LIMIT:
      raise ValueError(
        f"{self.config=} takes {needed} bytes > SMEM_LIMIT={limits.SMEM_LIMIT}."
      )

  @property
  def operand_dtype(self) -> DTypeLike:
    """Dtype of wgmma operands; float16 represents 8-bit elements exactly."""
    return jnp.float16 if self.is_quantised else self.dtype

  def as_operand(self, q):
    """Returns queries in `operand_dtype`, clamped to its range."""
    if not self.is_quantised or q.dtype == self.operand_dtype:
      return q
    most = float(jnp.finfo(self.operand_dtype).max)
    q = jnp.clip(q.astype(jnp.float32), -most, most)
    return q.astype(self.operand_dtype)

  @property
  def is_permuted(self) -> bool:
    """Whether the head_dim axis of Q is permuted, see `fragments`."""
    return self.is_quantised and self.interpret is None

  @property
  def operand_transforms(
    self,
  ) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of 16-bit wgmma operands: swizzled tiles of 8 rows."""
    swizzle = swizzle_bytes(self.head_dim * 2)
    assert swizzle is not None  # head_dim is a multiple of 16
    return (
      plgpu.TilingTransform((8, swizzle // 2)),
      plgpu.SwizzleTransform(swizzle),
    )

  @property
  def max_splits(self) -> int:
    """Splits per item, at most, with fixed splits."""
    capacity = self.pages_per_seq * self.page_size
    tiles = cdiv(capacity, self.config.block_kv)
    return min(schedule.MAX_SPLITS, cdiv(tiles, schedule.LEAST_SPLIT))

  @property
  def num_rows(self) -> int:
    """Queries per item, without padding."""
    return self.group * self.max_q_len

  @property
  def has_q_lens(self) -> bool:
    """Whether sequences may differ in their number of query tokens."""
    return self.max_q_len > 1 or self.has_tree

  @property
  def num_queries(self) -> int:
    """Queries per item, padded: the columns of a tile."""
    return padded_queries(self.num_rows)

  @property
  def loads_tiles_of_q(self) -> bool:
    """Whether TMA copies Q directly into tiles for wgmma; XLA pads Q then.

    Otherwise TMA copies Q row-major, and the consumer moves it into tiles
    through registers, whose layout needs blocks of 64 rows of Q^T.
    """
    return self.head_dim % 64 != 0

  def visit(self, kv_len, q_len=None, tree=None):
    """Returns the KV tiles that the queries of sequences visit.

    Args:
      kv_len: Stored tokens.
      q_len: Query tokens; None if every sequence has one.
      tree: `of_seqs` of `tree_bits.Few`; None without a tree mask.
    """
    num_earlier = jnp.zeros_like(kv_len)
    if q_len is not None:
      num_earlier = jnp.maximum(q_len - 1, 0)
      kv_len = jnp.where(q_len > 0, kv_len, 0)
    if tree is not None:
      num_earlier = tree_bits.unseen(tree)
    return self.visited_tiles(
      kv_len, num_earlier, None if tree is None else q_len
    )

  def pad_queries(self, x):
    """Pads the second axis of x from `num_rows` to `num_queries` with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[1] = 0, self.num_queries - self.num_rows
    return jnp.pad(x, padding)


def scratch(problem: DecodeProblem) -> Scratch:
  """Declares the shared memory and the barriers of a program.

  Args:
    problem: The static sizes.
  """
  config, head_dim = problem.config, problem.head_dim
  stages = config.num_stages, config.block_kv
  barriers = functools.partial(refs.barrier, num_barriers=config.num_stages)

  def operand(*shape):
    transforms = problem.operand_transforms
    return refs.smem(shape, problem.operand_dtype, transforms)

  tiles, scales = operand(*stages, head_dim), None
  if problem.is_quantised:
    transforms = fragments.transforms(head_dim)
    tiles = refs.smem((*stages, head_dim), problem.kv_dtype, transforms)
    scales = refs.smem(stages, jnp.float32)
  num_copies = problem.num_chunks * (2 if problem.is_quantised else 1)
  ring = Ring(
    tiles=tiles,
    scales=scales,
    loaded=barriers(num_arrivals=num_copies),
    consumed=barriers(),
  )
  return Scratch(
    q_row_major=refs.smem((problem.num_queries, head_dim), problem.dtype),
    q=operand(problem.num_queries, head_dim),
    k=ring,
    v=ring,
    p=operand(problem.num_queries, config.block_kv),
    output=OutputScratch.types(head_dim, problem.num_queries, problem.dtype),
    q_loaded=refs.barrier(),
    q_consumed=refs.barrier(),
  )
