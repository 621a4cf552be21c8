"""Ragged: static sizes, inputs, outputs, shared memory, and the work item."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import refs, schedule, tree_bits
from pallas_kernels.common.base2 import LOG2_E, to_base_2
from pallas_kernels.common.kv_tiles import VisitedTiles
from pallas_kernels.common.limits import SMEM_LIMIT
from pallas_kernels.common.paged_kv import KVArrays
from pallas_kernels.common.problem import PagedProblem
from pallas_kernels.common.types import ArrayOrRef, Ref
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged import query_tiles
from pallas_kernels.ragged.config import ROWS, Config
from pallas_kernels.ragged.query_tiles import QueryTile

COMPILER_PARAMS = plgpu.CompilerParams(
  approx_math=True,
  lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
  reduction_scratch_bytes=0,  # four threads of a warp reduce a row by shuffles
)


class Inputs(NamedTuple):
  """Arrays in global memory that the kernel reads."""

  num_items: ArrayOrRef | None  # i32[1]; None if items are split
  splits: schedule.Splits | None  # None unless items are split
  tiles: ArrayOrRef  # i32[num_tiles, fields], see `query_tiles.TileList`
  holes: ArrayOrRef  # i32[num_seqs], 1 where a query may see an unmapped page
  page_indices: ArrayOrRef  # i32[num_seqs, pages_per_seq]
  layer: ArrayOrRef | None  # i32[1]; None: the pool has one layer
  q: ArrayOrRef  # [num_tokens, num_kv_heads, group, head_dim]
  k: KVArrays
  v: KVArrays
  sinks: ArrayOrRef | None  # f32[num_kv_heads, block_q], in base 2
  alibi_slopes: ArrayOrRef | None  # f32[num_kv_heads, block_q], in base 2
  tree: tree_bits.Many | None


class Partials(NamedTuple):
  """Partial softmax states of the first and the last item of each program."""

  acc: ArrayOrRef  # f32[2, num_programs, block_q, head_dim]
  m: ArrayOrRef  # f32[2, num_programs, block_q]
  l: ArrayOrRef  # f32[2, num_programs, block_q]


class Outputs(NamedTuple):
  """Arrays in global memory that the kernel writes."""

  out: Ref  # [num_tokens, num_kv_heads, group, head_dim]
  lse: Ref  # f32[num_tiles, num_kv_heads, block_q]
  partials: Partials | None  # None unless items are split


class Ring(NamedTuple):
  """A ring of `num_stages` tiles of K or of V in shared memory."""

  consumed: Ref  # barriers, one arrival per consumer: it has read the tile
  loaded: Ref  # barriers: the tile is in shared memory
  tiles: Ref  # [num_stages, block_kv, head_dim], in tiles for wgmma


class Staging(NamedTuple):
  """A ring of slices of 8-bit tiles, which the producer dequantises."""

  loaded: Ref  # barriers: the slice and its scales are in shared memory
  scales: Ref  # f32[num_staged, staged_rows]
  elements: Ref  # [num_staged, staged_rows, head_dim]


class Scratch(NamedTuple):
  """Shared memory and barriers of a program.

  The fields lie in shared memory in this order, and the order matters: with Q
  first, a prefill of 4,096 tokens took 2.8 % longer (H200).
  """

  k: Ring
  out: Ref  # two views of the same bytes, see `_rows`
  p: Ref | None  # [num_compute_wgs, ROWS, block_kv], in tiles for wgmma
  q_consumed: Ref  # barriers, one arrival per consumer: it has read Q
  q_loaded: Ref  # barriers: Q is in shared memory
  q: Ref  # two views of the same bytes, see `_rows`
  staging: Staging | None  # None unless pages are quantised
  v_cleaned: Ref | None  # barriers: unseen rows of V are 0; None: one consumer
  v: Ring


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedProblem(PagedProblem[Config]):
  """The static sizes and options of a launch of the ragged kernel.

  `group` is padded, see `config.padded_group`.

  Raises:
    ValueError: If the config exceeds shared memory, or a query tile is no whole
      number of tokens.
  """

  num_tokens: int

  def __post_init__(self):
    needed = ragged_config.smem_bytes(
      self.config, self.head_dim, self.is_quantised
    )
    if needed > SMEM_LIMIT:
      raise ValueError(f"{self.config=} takes {needed} bytes > {SMEM_LIMIT=}.")
    if self.config.block_q % self.group:
      raise ValueError(
        f"{self.config.block_q=} must be a multiple of {self.group=}."
      )

  @property
  def num_staged(self) -> int:
    """Slices of 8-bit tiles in the staging ring."""
    return ragged_config.staging(self.config, self.head_dim)[0]

  @property
  def staged_rows(self) -> int:
    """Rows per slice of an 8-bit tile."""
    return ragged_config.staging(self.config, self.head_dim)[1]

  @property
  def columns(self) -> int:
    """Columns per wgmma tile in shared memory."""
    swizzle = ragged_config.operand_swizzle(self.head_dim)
    return swizzle // jnp.dtype(self.dtype).itemsize

  @property
  def transforms(
    self,
  ) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of 16-bit wgmma operands: swizzled tiles of 8 rows."""
    swizzle = ragged_config.operand_swizzle(self.head_dim)
    return (
      plgpu.TilingTransform((8, self.columns)),
      plgpu.SwizzleTransform(swizzle),
    )

  @property
  def wg_tokens(self) -> int:
    """Query tokens per consumer warpgroup."""
    return max(ROWS // self.group, 1)

  @property
  def wg_heads(self) -> int:
    """Query heads per token in a consumer warpgroup."""
    return ROWS // self.wg_tokens

  def rows_of(self, wg):
    """Returns a consumer warpgroup's first token in a query tile, and heads.

    Args:
      wg: Index of the consumer warpgroup.
    """
    first, head = divmod(wg * ROWS, self.group)
    return first, pl.ds(head, self.wg_heads)

  def reinterpret(self, source, target) -> None:
    """Copies one view of shared memory to the other, in the interpreter.

    On a GPU, both views are the same bytes (`_rows`), and this does nothing.

    Args:
      source: The view that was written.
      target: The view to read.
    """
    if self.interpret is not None:
      target[...] = source[...].reshape(target.shape)
      plgpu.commit_smem()

  @property
  def sizes(self) -> query_tiles.Sizes:
    """The static sizes of the list of query tiles."""
    return query_tiles.Sizes(
      num_tokens=self.num_tokens,
      num_seqs=self.num_seqs,
      num_kv_heads=self.num_kv_heads,
      tile_tokens=self.config.block_q // self.group,
      causal=self.spec.causal,
    )

  @property
  def p_in_smem(self) -> bool:
    """Whether P goes through shared memory; the interpreter requires it."""
    return self.config.p_in_smem or self.interpret is not None

  def factor(self, has_alibi: bool) -> float:
    """Returns the factor that takes the result of `scores` to base 2.

    It is folded into the exponentials if possible, else it is 1.

    Args:
      has_alibi: Whether there are ALiBi slopes.
    """
    # Masked scores are already -inf when the factor is applied, so the factor
    # must be positive: 0 * -inf is NaN.
    scale = self.spec.scale
    is_number = scale >= float(jnp.finfo(jnp.float32).tiny)
    in_softmax = self.spec.logits_soft_cap is None and is_number
    in_softmax &= not has_alibi
    return scale * LOG2_E if in_softmax else 1.0

  def scores(self, qk, has_alibi: bool):
    """Returns scores, which `factor` takes to base 2.

    Args:
      qk: f32, dot products.
      has_alibi: Whether there are ALiBi slopes.
    """
    if self.factor(has_alibi) != 1.0:
      return qk
    return to_base_2(qk, self.spec.scale, self.spec.logits_soft_cap)


class Item(NamedTuple):
  """A work item: a query tile for one KV head, or a split of that."""

  nth: jax.Array  # index of the query tile in the list
  head: jax.Array  # KV head
  tile: QueryTile
  first: jax.Array | int  # first KV tile to attend, among the visited ones
  num_tiles: jax.Array  # KV tiles to attend
  is_whole: (
    jax.Array | None
  )  # whether it is no split; None: items are not split
  kind: jax.Array | None  # of a split: `FIRST` or `LAST` item of the program


class Count(NamedTuple):
  """Items and KV tiles that a program has attended so far."""

  num_items: jax.Array  # with at least one KV tile
  num_tiles: jax.Array

  def add(self, item: Item) -> "Count":
    """Returns the count with one more item."""
    num_items = self.num_items + (item.num_tiles > 0).astype(jnp.int32)
    return Count(num_items, self.num_tiles + item.num_tiles)


class Work(NamedTuple):
  """An item of a program, with the operands and positions in the rings."""

  problem: RaggedProblem
  inputs: Inputs
  outputs: Outputs
  smem: Scratch
  layer: jax.Array | None
  item: Item
  tiles: VisitedTiles  # KV tiles that the query tile visits
  done: Count  # items and KV tiles of the program before this item

  def base(self, i):
    """Returns the first position of the item's i-th KV tile."""
    return self.tiles.base(self.item.first + i)

  def stage(self, i):
    """Returns the stage of the item's i-th KV tile, in K's ring and in V's."""
    num_stages = self.problem.config.num_stages
    return lax.rem(self.done.num_tiles + i, jnp.int32(num_stages))

  @property
  def q_stage(self):
    """The stage of the item's Q."""
    num_stages = self.problem.config.num_q_stages
    return lax.rem(self.done.num_items, jnp.int32(num_stages))

  def ring_is_full(self, i):
    """Returns whether the i-th KV tile must wait for a release of its stage."""
    num_stages = self.problem.config.num_stages
    return self.done.num_tiles + i >= num_stages


def scratch(problem: RaggedProblem) -> Scratch:
  """Declares the shared memory and the barriers of a program.

  Args:
    problem: The static sizes.
  """
  config, head_dim = problem.config, problem.head_dim
  num_wgs, num_stages = config.num_compute_wgs, config.num_stages
  # Copies arrive chunk by chunk; the warpgroup that dequantises arrives once.
  num_copies = 1 if problem.is_quantised else problem.num_chunks
  barriers = functools.partial(refs.barrier, num_barriers=num_stages)
  ring = Ring(
    tiles=_smem(problem, True, num_stages, config.block_kv, head_dim),
    loaded=barriers(num_arrivals=num_copies),
    consumed=barriers(num_arrivals=num_wgs),
  )
  p = None
  if problem.p_in_smem:
    # wgmma requires both operands in shared memory to have the same swizzle.
    p = _smem(problem, True, num_wgs, ROWS, config.block_kv)
  return Scratch(
    q=_rows(problem, head_dim, config.num_q_stages),
    q_loaded=refs.barrier(
      num_arrivals=num_wgs * (head_dim // problem.columns),
      num_barriers=config.num_q_stages,
    ),
    q_consumed=refs.barrier(
      num_arrivals=num_wgs, num_barriers=config.num_q_stages
    ),
    k=ring,
    v=ring,
    v_cleaned=barriers() if num_wgs > 1 else None,
    p=p,
    out=output_scratch(problem),
    staging=_staging(problem) if problem.is_quantised else None,
  )


def _staging(problem: RaggedProblem) -> Staging:
  """Declares the staging ring of 8-bit slices."""
  shape = problem.num_staged, problem.staged_rows
  num_copies = max(problem.staged_rows // problem.chunk, 1)
  return Staging(
    elements=refs.smem((*shape, problem.head_dim), problem.kv_dtype),
    scales=refs.smem(shape, jnp.float32),
    loaded=refs.barrier(
      num_arrivals=2 * num_copies, num_barriers=problem.num_staged
    ),
  )


def output_scratch(problem: RaggedProblem) -> Ref:
  """Declares the shared memory of the output.

  Args:
    problem: The static sizes.
  """
  columns = ragged_config.output_columns(problem.head_dim, problem.is_quantised)
  return _rows(problem, columns)


def _smem(problem: RaggedProblem, is_tiled: bool, *shape: int) -> Ref:
  """Declares swizzled shared memory, with or without tiles of 8 rows."""
  tiles, swizzle = problem.transforms
  transforms = (tiles, swizzle) if is_tiled else (swizzle,)
  return refs.smem(shape, problem.dtype, transforms)


def _rows(problem: RaggedProblem, num_columns: int, *outer: int) -> Ref:
  """Declares the rows of each consumer warpgroup, in columns of wgmma tiles.

  There are two views of the same bytes: by token, for copies from and to the
  token axis, and by row, for wgmma. A column of tiles is as wide as the
  swizzle, so that consecutive rows of the column are contiguous.
  """
  outer += problem.config.num_compute_wgs, num_columns // problem.columns
  inner = problem.wg_tokens, problem.wg_heads, problem.columns
  by_token = _smem(problem, False, *outer, *inner)
  by_row = _smem(problem, True, *outer, ROWS, problem.columns)
  if problem.interpret is not None:  # see `RaggedProblem.reinterpret`
    return by_token, by_row
  return plgpu.RefUnion(by_token, by_row)  # the body gets a pair as well
