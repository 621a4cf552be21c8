"""What is static about a launch of the ragged kernel, and its memory."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common import kv_tiles
from pallas_kernels.decode.config import SMEM_LIMIT, is_quantised
from pallas_kernels.decode.softmax import LOG2_E, to_base_2
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged import query_tiles
from pallas_kernels.ragged.config import ROWS, Config

COMPILER_PARAMS = plgpu.CompilerParams(
  approx_math=True,
  lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
  reduction_scratch_bytes=0,  # rows are reduced by four threads each
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is static about a launch."""

  config: Config
  dtype: DTypeLike  # of the queries
  kv_dtype: DTypeLike  # of the pages
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
  has_alibi: bool
  causal: bool
  has_tree: bool
  interpret: plgpu.InterpretGPUParams | None

  def __post_init__(self):
    needed = ragged_config.smem_bytes(
      self.config, self.head_dim, self.is_quantised
    )
    if needed > SMEM_LIMIT:
      raise ValueError(f"{self.config=} takes {needed} bytes > {SMEM_LIMIT=}.")
    if self.config.block_q % self.group:
      raise ValueError(f"{self.config.block_q=} must be whole {self.group=}s.")

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
  def num_staged(self) -> int:
    """Pieces of tiles on their way to be widened."""
    return ragged_config.staging(self.config, self.head_dim)[0]

  @property
  def staged_rows(self) -> int:
    """Rows of a piece of a tile."""
    return ragged_config.staging(self.config, self.head_dim)[1]

  @property
  def columns(self) -> int:
    """Columns of a tile of shared memory."""
    swizzle = ragged_config.swizzle_bytes(self.head_dim)
    return swizzle // jnp.dtype(self.dtype).itemsize

  @property
  def transforms(self) -> tuple[Any, Any]:
    """What makes tiles of 8 rows of shared memory, for wgmma."""
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

  def reinterpret(self, source, target):
    """Lets memory be seen by row instead of by token, or the other way.

    Both are the same bytes, but not to the interpreter.
    """
    if self.interpret is not None:
      target[...] = source[...].reshape(target.shape)
      plgpu.commit_smem()

  @property
  def sizes(self) -> query_tiles.Sizes:
    """What is static about the list of items."""
    return query_tiles.Sizes(
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
    # Masked scores are -inf already: times a scale that is 0 they were NaN.
    is_number = self.scale >= float(jnp.finfo(jnp.float32).tiny)
    in_softmax = self.logits_soft_cap is None and is_number
    in_softmax &= not self.has_alibi
    return self.scale * LOG2_E if in_softmax else 1.0

  def scores(self, qk):
    """Returns the scores of products q k, which `factor` takes to base 2."""
    if self.factor != 1.0:
      return qk
    return to_base_2(qk, self.scale, self.logits_soft_cap)

  def visit(self, kv_len, num_earlier, num_new=None) -> kv_tiles.Tiles:
    """Returns the tiles that items visit."""
    return kv_tiles.visit(
      kv_len,
      num_earlier,
      num_new,
      capacity=self.pages_per_seq * self.page_size,
      block_kv=self.config.block_kv,
      sliding_window=self.sliding_window,
      num_sink_tokens=self.num_sink_tokens,
    )


class Item(NamedTuple):
  """A tile of queries for one KV head, or a part of it."""

  nth: Any  # place of the tile in the list
  head: Any
  tile: query_tiles.Tile
  first: Any  # of the visited tiles of K, the first to attend
  num_tiles: Any  # of K to attend
  is_whole: Any  # None if all are
  kind: Any  # of the partial of a part, see `partials`


class Count(NamedTuple):
  """What a program has attended."""

  num_items: Any  # that have tiles
  num_tiles: Any  # of K

  def add(self, item: Item) -> "Count":
    """Counts an item, too."""
    num_items = self.num_items + (item.num_tiles > 0).astype(jnp.int32)
    return Count(num_items, self.num_tiles + item.num_tiles)


class Work(NamedTuple):
  """An item that a program attends, and what it takes."""

  problem: Problem
  gmem: Any  # arrays, by name
  smem: Any  # shared memory and barriers, by name
  item: Item
  tiles: kv_tiles.Tiles  # that the item visits
  before: Count  # what the program attended before

  def base(self, i):
    """Returns the position at which the i-th tile of K begins."""
    return self.tiles.base(self.item.first + i)

  def slot(self, i):
    """Returns the place of the i-th tile of K in the ring."""
    num_stages = self.problem.config.num_stages
    return lax.rem(self.before.num_tiles + i, jnp.int32(num_stages))

  @property
  def q_slot(self):
    """The place of Q in the ring."""
    num_stages = self.problem.config.num_q_stages
    return lax.rem(self.before.num_items, jnp.int32(num_stages))


def scratch(problem: Problem) -> dict[str, Any]:
  """Returns the shared memory and the barriers of a program."""
  config, head_dim = problem.config, problem.head_dim
  num_wgs, num_stages = config.num_compute_wgs, config.num_stages
  # Tiles of 8-bit numbers are not copied there, but widened.
  num_copies = 1 if problem.is_quantised else problem.num_chunks
  tiled = functools.partial(_smem, problem, True)
  barriers = functools.partial(plgpu.Barrier, num_barriers=num_stages)
  memory = {
    "q_smem": _rows(problem, head_dim, config.num_q_stages),
    **output_scratch(problem),
    "k_smem": tiled(num_stages, config.block_kv, head_dim),
    "v_smem": tiled(num_stages, config.block_kv, head_dim),
    "q_loaded": plgpu.Barrier(
      num_arrivals=num_wgs * (head_dim // problem.columns),
      num_barriers=config.num_q_stages,
    ),
    "q_consumed": plgpu.Barrier(
      num_arrivals=num_wgs, num_barriers=config.num_q_stages
    ),
    "k_loaded": barriers(num_arrivals=num_copies),
    "v_loaded": barriers(num_arrivals=num_copies),
    "k_consumed": barriers(num_arrivals=num_wgs),
    "v_consumed": barriers(num_arrivals=num_wgs),
  }
  if problem.is_quantised:
    memory |= _staging(problem)
  if problem.p_in_smem:
    # With the swizzle of V, as the operands of wgmma must.
    memory["p_smem"] = tiled(num_wgs, ROWS, config.block_kv)
  if num_wgs > 1:
    memory["v_cleaned"] = barriers()
  return memory


def _staging(problem: Problem) -> dict[str, Any]:
  """Returns the shared memory and the barriers of 8-bit numbers."""
  shape = problem.num_staged, problem.staged_rows
  num_copies = max(problem.staged_rows // problem.chunk, 1)
  return {
    "staged_smem": plgpu.SMEM((*shape, problem.head_dim), problem.kv_dtype),
    "staged_scales_smem": plgpu.SMEM(shape, jnp.float32),
    "staged": plgpu.Barrier(
      num_arrivals=2 * num_copies, num_barriers=problem.num_staged
    ),
  }


def output_scratch(problem: Problem) -> dict[str, Any]:
  """Returns the shared memory for what is written."""
  columns = ragged_config.output_columns(problem.head_dim, problem.is_quantised)
  return {"out_smem": _rows(problem, columns)}


def _smem(problem: Problem, is_tiled: bool, *shape: int):
  """Returns swizzled shared memory, in tiles of 8 rows or in none."""
  tiles, swizzle = problem.transforms
  transforms = (tiles, swizzle) if is_tiled else (swizzle,)
  return plgpu.SMEM(shape, problem.dtype, transforms=transforms)


def _rows(problem: Problem, num_columns: int, *outer: int):
  """Returns memory of the rows of each warpgroup, column of tiles by column.

  The same bytes are seen twice: by token, as they are copied from and to the
  token axis, and as rows in tiles, for wgmma. A column of tiles is as wide as
  the swizzle, so that its tiles are its rows, one after the other.
  """
  outer += problem.config.num_compute_wgs, num_columns // problem.columns
  inner = problem.wg_tokens, problem.wg_heads, problem.columns
  by_token = _smem(problem, False, *outer, *inner)
  by_row = _smem(problem, True, *outer, ROWS, problem.columns)
  if problem.interpret is not None:  # see `Problem.reinterpret`
    return by_token, by_row
  return plgpu.RefUnion(by_token, by_row)
