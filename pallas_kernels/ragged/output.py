"""Ragged: writes outputs of whole items and partial states of split items.

A program that attended a whole item writes its output to the token axis. For a
split it writes a partial softmax state, as the first or the last of its items.
A second kernel merges the partials. It has one program per program of the
schedule: if an item begins before the program's range and ends in it, the
program folds the partials of all programs that attended the item, and writes
the output in place.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import refs
from pallas_kernels.common.base2 import Softmax
from pallas_kernels.common.schedule import FIRST, LAST, TileRanges
from pallas_kernels.common.types import ArrayOrRef, Ref
from pallas_kernels.ragged import query_tiles, softmax
from pallas_kernels.ragged.config import ROWS
from pallas_kernels.ragged.problem import (
  COMPILER_PARAMS,
  Outputs,
  Partials,
  RaggedProblem,
  Work,
  output_scratch,
)
from pallas_kernels.ragged.query_tiles import QueryTile


def types(problem: RaggedProblem) -> Outputs:
  """Declares the output, the LSE and, if items are split, the partials.

  Args:
    problem: The static sizes.
  """
  config, head_dim = problem.config, problem.head_dim
  num_tiles, num_kv_heads = problem.sizes.num_tiles, problem.num_kv_heads
  by_token = problem.num_tokens, num_kv_heads, problem.group, head_dim
  f32 = lambda *shape: refs.output(shape, jnp.float32)
  rows = 2, config.num_programs, config.block_q
  return Outputs(
    out=refs.output(by_token, problem.dtype),
    lse=f32(num_tiles, num_kv_heads, config.block_q),
    partials=(
      Partials(f32(*rows, head_dim), f32(*rows), f32(*rows))
      if config.splits
      else None
    ),
  )


class _Target(NamedTuple):
  """The destination of the output of an item."""

  nth: jax.Array  # index of the query tile in the list
  head: jax.Array  # KV head
  tile: QueryTile
  out: Ref
  lse: Ref
  smem: Ref


def write(work: Work, state: Softmax) -> None:
  """Writes the output of a warpgroup's rows of an item, or their partial.

  Args:
    work: The item.
    state: The softmax state of the rows, over the KV tiles of the item.
  """
  item, outputs = work.item, work.outputs
  target = _Target(
    item.nth, item.head, item.tile, outputs.out, outputs.lse, work.smem.out
  )
  sinks = work.inputs.sinks
  output = functools.partial(_write_output, work.problem, target, state, sinks)
  if item.is_whole is None:
    output()
    return
  pl.when(item.is_whole)(output)

  @pl.when(jnp.logical_not(item.is_whole))
  def _():
    at = item.kind, lax.axis_index("program"), _own_rows()
    assert outputs.partials is not None  # items are split
    for ref, value in zip(outputs.partials, state, strict=True):
      ref.at[at][...] = value


def _own_rows():
  return pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)


def load_rows(ref, head):
  """Loads one value per row of the calling warpgroup.

  Args:
    ref: f32[num_kv_heads, block_q] in global memory.
    head: KV head.
  """
  return _load(ref.at[head, _own_rows()], softmax.QUERIES)


def _load(ref, layout):
  return plgpu.load(ref, layout=layout, optimized=False)


def _write_output(problem, target, state, sinks):
  """Writes the output and the LSE of a warpgroup's rows."""
  # 1. Normalise. The LSE goes to global memory directly.
  if sinks is not None:
    sinks = load_rows(sinks, target.head)
  out, lse = softmax.finish(state, sinks)
  target.lse.at[target.nth, target.head, _own_rows()][...] = lse
  # 2. Copy the output through shared memory, as many columns as it holds.
  by_token, by_row = (x.at[lax.axis_index("warpgroup")] for x in target.smem)
  num_columns = by_row.shape[0] * problem.columns
  for start in range(0, problem.head_dim, num_columns):
    # The copy of the previous columns may still read shared memory.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i in range(by_row.shape[0]):
      column = start + i * problem.columns
      columns = out[:, column : column + problem.columns]
      by_row.at[i][...] = columns.astype(problem.dtype)
    problem.reinterpret(by_row, by_token)
    plgpu.commit_smem()
    _copy_columns(problem, target, by_token, start)


def _copy_columns(problem, target, by_token, start):
  """Copies a warpgroup's output to its tokens, and to no token after them."""
  first, heads = problem.rows_of(lax.axis_index("warpgroup"))
  num_tokens = jnp.clip(target.tile.num_tokens - first, 0, problem.wg_tokens)
  is_full = num_tokens == problem.wg_tokens
  for i in range(by_token.shape[0]):
    columns = pl.ds(start + i * problem.columns, problem.columns)

    def target_of(token, columns=columns):
      return target.out.at[token, target.head, heads, columns]

    @pl.when(is_full)
    def _(i=i, target_of=target_of):
      tokens = pl.ds(target.tile.token + first, problem.wg_tokens)
      plgpu.copy_smem_to_gmem(by_token.at[i], target_of(tokens))

    @pl.loop(0, jnp.where(is_full, 0, num_tokens))
    def _(t, i=i, target_of=target_of):
      token = target.tile.token + first + t
      plgpu.copy_smem_to_gmem(by_token.at[i, t], target_of(token))


class _Inputs(NamedTuple):
  """Operands of the merging kernel; it updates `out` and `lse` in place."""

  firsts: ArrayOrRef
  tiles: ArrayOrRef
  partials: Partials
  sinks: ArrayOrRef | None
  out: Ref
  lse: Ref


def merge_partials(
  problem: RaggedProblem,
  firsts: jax.Array,
  tiles: jax.Array,
  sinks: jax.Array | None,
  written: Outputs,
) -> tuple[jax.Array, jax.Array]:
  """Merges the partials of split items, and writes their outputs.

  Args:
    problem: The static sizes.
    firsts: See `schedule.Splits`.
    tiles: See `query_tiles.TileList`.
    sinks: f32[num_kv_heads, block_q], logits in base 2, or None.
    written: Outputs of the first kernel: the partials, and `out` and `lse`
      without split items, which are updated in place.

  Returns:
    The complete output and log-sum-exp.
  """
  kernel = plgpu.kernel(
    functools.partial(_merge, problem),
    out_type=(),
    scratch_types={"smem": output_scratch(problem)},
    grid=(problem.config.num_programs,),
    grid_names=("program",),
    num_threads=problem.config.num_compute_wgs,
    thread_name="warpgroup",
    compiler_params=COMPILER_PARAMS,
    interpret=problem.interpret,
    kernel_name="merge_ragged_partials",
  )
  assert written.partials is not None  # items are split
  out, lse = jax.new_ref(written.out), jax.new_ref(written.lse)
  kernel(_Inputs(firsts, tiles, written.partials, sinks, out, lse))
  return out[...], lse[...]


def _merge(problem: RaggedProblem, inputs: _Inputs, smem: Ref) -> None:
  """The program: merges the item that ends in its range, if split."""
  # 1. Find the item in which the program's range begins.
  firsts = inputs.firsts
  program, num_programs = lax.axis_index("program"), problem.config.num_programs
  begin, end = firsts[program, 0], firsts[program + 1, 0]
  nth, head, tile_in_item, cost = (firsts[program, i] for i in range(1, 5))
  ranges = TileRanges(firsts[num_programs, 0], num_programs)

  # 2. Most programs end here. The others fold the partials in order: the last
  # one of the program in which the item begins, then the first of each program.
  @pl.when(
    (begin < end) & (tile_in_item > 0) & (begin - tile_in_item + cost <= end)
  )
  def _():
    tile = query_tiles.load(inputs.tiles, nth)
    first = ranges.program_of(begin - tile_in_item)
    is_last = ranges.start(first) < begin - tile_in_item

    def fold(p, state):
      kind = jnp.where((p == first) & is_last, LAST, FIRST)
      return softmax.merge(state, _load_partial(inputs.partials, (kind, p)))

    state = softmax.init(ROWS, problem.head_dim)
    state = lax.fori_loop(first, program + 1, fold, state)

    # 3. Write the output in place.
    target = _Target(nth, head, tile, inputs.out, inputs.lse, smem)
    _write_output(problem, target, state, inputs.sinks)
    plgpu.wait_smem_to_gmem(0)


def _load_partial(partials: Partials, at) -> Softmax:
  """Loads the calling warpgroup's rows of a partial."""
  at = *at, _own_rows()
  return Softmax(
    _load(partials.acc.at[at], plgpu.Layout.WGMMA),
    _load(partials.m.at[at], softmax.QUERIES),
    _load(partials.l.at[at], softmax.QUERIES),
  )
