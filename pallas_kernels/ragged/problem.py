"""What the ragged kernel is given: static facts, arrays, shared memory."""

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
  reduction_scratch_bytes=0,  # rows are reduced by four threads each
)


class Inputs(NamedTuple):
  """Arrays that the kernel reads."""

  num_items: ArrayOrRef | None  # i32[1], where items are not split
  plan: schedule.Plan | None  # where they are
  tiles: ArrayOrRef  # i32[num_tiles, fields], see `query_tiles.TileList`
  holes: ArrayOrRef  # i32[num_seqs], 1 where a query may see an unmapped page
  page_indices: ArrayOrRef  # i32[num_seqs, pages_per_seq]
  layer: ArrayOrRef | None  # i32[1]; None: the only layer
  q: ArrayOrRef  # [num_tokens, num_kv_heads, group, head_dim]
  k: KVArrays
  v: KVArrays
  sinks: ArrayOrRef | None  # f32[num_kv_heads, block_q], in base 2
  alibi_slopes: ArrayOrRef | None  # f32[num_kv_heads, block_q], in base 2
  tree: tree_bits.Many | None


class Partials(NamedTuple):
  """A softmax for the first and for the last item of each program."""

  acc: ArrayOrRef  # f32[2, num_programs, block_q, head_dim]
  m: ArrayOrRef  # f32[2, num_programs, block_q]
  l: ArrayOrRef  # f32[2, num_programs, block_q]


class Outputs(NamedTuple):
  """Arrays that the kernel writes."""

  out: Ref  # [num_tokens, num_kv_heads, group, head_dim]
  lse: Ref  # f32[num_tiles, num_kv_heads, block_q]
  partials: Partials | None  # where items are split


class Ring(NamedTuple):
  """A ring of `num_stages` tiles of K or of V in shared memory."""

  consumed: Ref  # barriers: the tile was read
  loaded: Ref  # barriers: the tile is there
  tiles: Ref  # [num_stages, block_kv, head_dim], in tiles for wgmma


class Staging(NamedTuple):
  """A ring of slices of tiles of 8-bit numbers, on their way to be widened."""

  loaded: Ref  # barriers
  scales: Ref  # f32[num_staged, staged_rows]
  numbers: Ref  # [num_staged, staged_rows, head_dim]


class Scratch(NamedTuple):
  """Shared memory and barriers of a program.

  Fields lie in shared memory in this order, and speed depends on it: with Q
  first, a prefill of 4,096 tokens took 2.8% longer on an H200.
  """

  k: Ring
  out: Ref  # two views of the same bytes, see `_rows`
  p: Ref | None  # [num_compute_wgs, ROWS, block_kv], in tiles for wgmma
  q_consumed: Ref
  q_loaded: Ref
  q: Ref  # two views of the same bytes
  staging: Staging | None  # of quantised pages
  v_cleaned: Ref | None  # with several compute warpgroups
  v: Ring


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedProblem(PagedProblem[Config]):
  """The static facts of a launch of the ragged kernel.

  `group` is padded to a power of two.
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
    """Slices of tiles on their way to be widened."""
    return ragged_config.staging(self.config, self.head_dim)[0]

  @property
  def staged_rows(self) -> int:
    """Rows of a slice of a tile."""
    return ragged_config.staging(self.config, self.head_dim)[1]

  @property
  def columns(self) -> int:
    """Columns of a tile of shared memory."""
    swizzle = ragged_config.swizzle_bytes(self.head_dim)
    return swizzle // jnp.dtype(self.dtype).itemsize

  @property
  def transforms(
    self,
  ) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The transforms that make tiles of 8 rows of shared memory, for wgmma."""
    swizzle = ragged_config.swizzle_bytes(self.head_dim)
    return (
      plgpu.TilingTransform((8, self.columns)),
      plgpu.SwizzleTransform(swizzle),
    )

  @property
  def wg_tokens(self) -> int:
    """Tokens of the rows of a compute warpgroup."""
    return max(ROWS // self.group, 1)

  @property
  def wg_heads(self) -> int:
    """Query heads of a token of a compute warpgroup."""
    return ROWS // self.wg_tokens

  def rows_of(self, wg):
    """Returns the first token of a warpgroup of a tile, and its heads."""
    first, head = divmod(wg * ROWS, self.group)
    return first, pl.ds(head, self.wg_heads)

  def reinterpret(self, source, target) -> None:
    """Makes memory visible by row that was written by token, or vice versa.

    Both are the same bytes, but not to the interpreter.
    """
    if self.interpret is not None:
      target[...] = source[...].reshape(target.shape)
      plgpu.commit_smem()

  @property
  def sizes(self) -> query_tiles.Sizes:
    """The static facts of the list of query tiles."""
    return query_tiles.Sizes(
      num_tokens=self.num_tokens,
      num_seqs=self.num_seqs,
      num_kv_heads=self.num_kv_heads,
      tile_tokens=self.config.block_q // self.group,
      causal=self.spec.causal,
    )

  @property
  def p_in_smem(self) -> bool:
    """Whether P is in shared memory: the interpreter wants it there."""
    return self.config.p_in_smem or self.interpret is not None

  def factor(self, has_alibi: bool) -> float:
    """Returns what `scores` are multiplied by for base 2."""
    # Masked scores are -inf already: times a scale that is 0 they were NaN.
    scale = self.spec.scale
    is_number = scale >= float(jnp.finfo(jnp.float32).tiny)
    in_softmax = self.spec.logits_soft_cap is None and is_number
    in_softmax &= not has_alibi
    return scale * LOG2_E if in_softmax else 1.0

  def scores(self, qk, has_alibi: bool):
    """Returns the scores of products q k, which `factor` takes to base 2."""
    if self.factor(has_alibi) != 1.0:
      return qk
    return to_base_2(qk, self.spec.scale, self.spec.logits_soft_cap)


class Item(NamedTuple):
  """A tile of queries for one KV head, or a split of it."""

  nth: jax.Array  # place of the tile in the list
  head: jax.Array
  tile: QueryTile
  first: jax.Array | int  # of the visited tiles of K, the first to attend
  num_tiles: jax.Array  # of K to attend
  is_whole: jax.Array | None  # None if all are
  kind: jax.Array | None  # `FIRST` or `LAST` item of the program, of a split


class Count(NamedTuple):
  """How much a program has attended."""

  num_items: jax.Array  # that have tiles
  num_tiles: jax.Array  # of K

  def add(self, item: Item) -> "Count":
    """Counts an item, too."""
    num_items = self.num_items + (item.num_tiles > 0).astype(jnp.int32)
    return Count(num_items, self.num_tiles + item.num_tiles)


class Work(NamedTuple):
  """An item that a program attends, and everything it needs for that."""

  problem: RaggedProblem
  inputs: Inputs
  outputs: Outputs
  smem: Scratch
  layer: jax.Array | None
  item: Item
  tiles: VisitedTiles  # of the item
  before: Count  # what the program attended before

  def base(self, i):
    """Returns the position at which the i-th tile of K begins."""
    return self.tiles.base(self.item.first + i)

  def stage(self, i):
    """Returns the place of the i-th tile of K in the ring."""
    num_stages = self.problem.config.num_stages
    return lax.rem(self.before.num_tiles + i, jnp.int32(num_stages))

  @property
  def q_stage(self):
    """The place of Q in the ring."""
    num_stages = self.problem.config.num_q_stages
    return lax.rem(self.before.num_items, jnp.int32(num_stages))

  def ring_is_full(self, i):
    """Returns whether the i-th tile must wait for another to be read."""
    num_stages = self.problem.config.num_stages
    return self.before.num_tiles + i >= num_stages


def scratch(problem: RaggedProblem) -> Scratch:
  """Returns the types of the shared memory and the barriers of a program."""
  config, head_dim = problem.config, problem.head_dim
  num_wgs, num_stages = config.num_compute_wgs, config.num_stages
  # Tiles of 8-bit numbers are not copied there, but widened.
  num_copies = 1 if problem.is_quantised else problem.num_chunks
  barriers = functools.partial(refs.barrier, num_barriers=num_stages)
  ring = Ring(
    tiles=_smem(problem, True, num_stages, config.block_kv, head_dim),
    loaded=barriers(num_arrivals=num_copies),
    consumed=barriers(num_arrivals=num_wgs),
  )
  p = None
  if problem.p_in_smem:
    # With the swizzle of V, as the operands of wgmma must.
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
  """Returns the shared memory and the barriers of 8-bit numbers."""
  shape = problem.num_staged, problem.staged_rows
  num_copies = max(problem.staged_rows // problem.chunk, 1)
  return Staging(
    numbers=refs.smem((*shape, problem.head_dim), problem.kv_dtype),
    scales=refs.smem(shape, jnp.float32),
    loaded=refs.barrier(
      num_arrivals=2 * num_copies, num_barriers=problem.num_staged
    ),
  )


def output_scratch(problem: RaggedProblem) -> Ref:
  """Returns the shared memory of the output."""
  columns = ragged_config.output_columns(problem.head_dim, problem.is_quantised)
  return _rows(problem, columns)


def _smem(problem: RaggedProblem, is_tiled: bool, *shape: int) -> Ref:
  """Returns swizzled shared memory, in tiles of 8 rows or in none."""
  tiles, swizzle = problem.transforms
  transforms = (tiles, swizzle) if is_tiled else (swizzle,)
  return refs.smem(shape, problem.dtype, transforms)


def _rows(problem: RaggedProblem, num_columns: int, *outer: int) -> Ref:
  """Returns memory of the rows of each warpgroup, column of tiles by column.

  The same bytes are seen twice: by token, as they are copied from and to the
  token axis, and as rows in tiles, for wgmma. A column of tiles is as wide as
  the swizzle, so that its tiles are its rows, one after the other.
  """
  outer += problem.config.num_compute_wgs, num_columns // problem.columns
  inner = problem.wg_tokens, problem.wg_heads, problem.columns
  by_token = _smem(problem, False, *outer, *inner)
  by_row = _smem(problem, True, *outer, ROWS, problem.columns)
  if problem.interpret is not None:  # see `RaggedProblem.reinterpret`
    return by_token, by_row
  return plgpu.RefUnion(by_token, by_row)  # the body gets a pair, too
