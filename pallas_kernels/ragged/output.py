"""What programs of the ragged kernel leave: outputs, and partials.

A program that attended a whole item writes its output to the token axis. Of a
part it leaves a partial softmax, as in decode (`partials`): as the first of its
items, or as the last. Merging has a program for each program of the schedule:
if an item began before its share and ends in it, it folds the partials of all
that attended the item, and writes the output in place.
"""

import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.schedule import Line
from pallas_kernels.decode.partials import FIRST, LAST
from pallas_kernels.ragged import query_tiles, softmax
from pallas_kernels.ragged.config import ROWS
from pallas_kernels.ragged.problem import (
  COMPILER_PARAMS,
  Problem,
  Work,
  output_scratch,
)
from pallas_kernels.ragged.softmax import State


def shapes(problem: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of output, LSE and, if items are split, of partials."""
  config, head_dim = problem.config, problem.head_dim
  num_tiles, num_kv_heads = problem.sizes.num_tiles, problem.num_kv_heads
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  by_token = problem.num_tokens, num_kv_heads, problem.group, head_dim
  written = (
    jax.ShapeDtypeStruct(by_token, problem.dtype),
    f32(num_tiles, num_kv_heads, config.block_q),
  )
  if not config.splits:
    return written
  rows = 2, config.num_programs, config.block_q
  return *written, f32(*rows, head_dim), f32(*rows), f32(*rows)


def write(work: Work, state: State) -> None:
  """Writes what a warpgroup attended of an item: its output or its partial."""
  item, gmem = work.item, work.gmem
  output = functools.partial(
    _write_output, work.problem, gmem, work.smem, item, state
  )
  if item.is_whole is None:
    output()
    return
  pl.when(item.is_whole)(output)

  @pl.when(jnp.logical_not(item.is_whole))
  def _():
    at = item.kind, lax.axis_index("program"), _own_rows()
    for ref, value in zip((gmem.acc, gmem.m, gmem.l), state, strict=True):
      ref.at[at][...] = value


def _own_rows():
  return pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)


def load_rows(ref, head):
  """Loads what f32[num_kv_heads, block_q] has for the rows of a warpgroup."""
  return _load(ref.at[head, _own_rows()], softmax.QUERIES)


def _load(ref, layout):
  return plgpu.load(ref, layout=layout, optimized=False)


def _write_output(problem, gmem, smem, item, state):
  """Writes the rows of a warpgroup."""
  sinks = None
  if problem.has_sinks:
    sinks = load_rows(gmem.sinks, item.head)
  out, lse = softmax.finish(state, sinks)
  gmem.lse.at[item.nth, item.head, _own_rows()][...] = lse
  by_token, by_row = (x.at[lax.axis_index("warpgroup")] for x in smem.out_smem)
  num_columns = by_row.shape[0] * problem.columns
  for start in range(0, problem.head_dim, num_columns):
    # The copy of the columns before may still be reading.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i in range(by_row.shape[0]):
      column = start + i * problem.columns
      columns = out[:, column : column + problem.columns]
      by_row.at[i][...] = columns.astype(problem.dtype)
    problem.reinterpret(by_row, by_token)
    plgpu.commit_smem()
    _copy_columns(problem, gmem, item, by_token, start)


def _copy_columns(problem, gmem, item, by_token, start):
  """Copies the output of a warpgroup to its tokens, and to no others."""
  first, heads = problem.rows_of(lax.axis_index("warpgroup"))
  num_tokens = jnp.clip(item.tile.num_tokens - first, 0, problem.wg_tokens)
  is_full = num_tokens == problem.wg_tokens
  for i in range(by_token.shape[0]):
    columns = pl.ds(start + i * problem.columns, problem.columns)

    def place(token, columns=columns):
      return gmem.out.at[token, item.head, heads, columns]

    @pl.when(is_full)
    def _(i=i, place=place):
      tokens = pl.ds(item.tile.token + first, problem.wg_tokens)
      plgpu.copy_smem_to_gmem(by_token.at[i], place(tokens))

    @pl.loop(0, jnp.where(is_full, 0, num_tokens))
    def _(t, i=i, place=place):
      token = item.tile.token + first + t
      plgpu.copy_smem_to_gmem(by_token.at[i, t], place(token))


def merge(problem: Problem, firsts, tiles, partials, sinks, out, lse):
  """Merges the partials of items that were split into their outputs.

  Args:
    problem: what is static.
    firsts: see `schedule.Plan`.
    tiles: see `query_tiles.Plan`.
    partials: what the programs left: acc, m and l.
    sinks: those of each row, f32[num_kv_heads, block_q], or None.
    out: the output, whose missing tokens are filled in.
    lse: the same.

  Returns:
    The output and the log-sum-exp.
  """
  kernel = plgpu.kernel(
    functools.partial(_merge, problem),
    out_type=(),
    scratch_types=output_scratch(problem),
    grid=(problem.config.num_programs,),
    grid_names=("program",),
    num_threads=problem.config.num_compute_wgs,
    thread_name="warpgroup",
    compiler_params=COMPILER_PARAMS,
    interpret=problem.interpret,
    kernel_name="merge_ragged_partials",
  )
  out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
  given = () if sinks is None else (sinks,)
  kernel(firsts, tiles, *partials, *given, out_ref, lse_ref)
  return out_ref[...], lse_ref[...]


def _merge(problem, *refs, **smem):
  """Merges the item in which the program's share begins, if it ends there."""
  names = "firsts", "tiles", "acc", "m", "l"
  names += ("sinks",) * problem.has_sinks + ("out", "lse")
  gmem = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  program, num_programs = lax.axis_index("program"), problem.config.num_programs
  begin, end = gmem.firsts[program, 0], gmem.firsts[program + 1, 0]
  nth, head, place, cost = (gmem.firsts[program, i] for i in range(1, 5))
  line = Line(gmem.firsts[num_programs, 0], num_programs)

  @pl.when((begin < end) & (place > 0) & (begin - place + cost <= end))
  def _():
    tile = query_tiles.load(gmem.tiles, nth)
    item = types.SimpleNamespace(nth=nth, head=head, tile=tile)
    first = line.program_of(begin - place)
    is_last = line.start(first) < begin - place

    def fold(p, state):
      kind = jnp.where((p == first) & is_last, LAST, FIRST)
      return softmax.merge(state, _load_partial(gmem, (kind, p)))

    state = softmax.init(ROWS, problem.head_dim)
    state = lax.fori_loop(first, program + 1, fold, state)
    _write_output(problem, gmem, types.SimpleNamespace(**smem), item, state)
    plgpu.wait_smem_to_gmem(0)


def _load_partial(gmem, at) -> State:
  """Loads the rows of a warpgroup of a partial."""
  at = *at, _own_rows()
  return State(
    _load(gmem.acc.at[at], plgpu.Layout.WGMMA),
    _load(gmem.m.at[at], softmax.QUERIES),
    _load(gmem.l.at[at], softmax.QUERIES),
  )
