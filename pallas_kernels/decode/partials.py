"""What decode programs leave behind: outputs, and partials that are merged.

A program that attended a whole item writes its output. Otherwise it leaves a
partial softmax (acc, m, l): as the first of its items, or as the last. Merging
has a program for each program of the schedule: if an item began before its
share and ends in it, it folds the partials of all programs that attended the
item, in their order, and writes the output in place.

  programs  |   4   |   5   |   6   |   7   |
  items         a  |          b       | c |     6 merges b: last of 4, first
  partials    F|  L|F       |F     |L         of 5 and first of 6

In fixed splits, an item has a place for each of its parts, and merging has a
program for each item. The parts are folded in the same order, in the same
groups, whatever else is in the batch.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common import gpu, schedule
from pallas_kernels.decode import softmax

FIRST, LAST = 0, 1  # of a program's items
_QUERIES = plgpu.Layout.WGMMA.reduce(0)


class Partials(NamedTuple):
  """A softmax for the first and for the last item of each program.

  In fixed splits: for the parts of each item. Arrays, their shapes, or in a
  kernel references to them.
  """

  acc: Any  # f32[2, num_programs, head_dim, num_queries]
  m: Any  # f32[2, num_programs, num_queries]
  l: Any  # f32[2, num_programs, num_queries]


def shapes(
  places: tuple[int, int], head_dim: int, num_queries: int
) -> Partials:
  """Returns the shapes of the partials.

  Args:
    places: 2 and the programs, or the items and the parts of one.
    head_dim: width of a head.
    num_queries: queries of an item.
  """
  rows = *places, num_queries
  acc = *places, head_dim, num_queries
  return Partials(
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (acc, rows, rows))
  )


def output_scratch(head_dim: int, num_queries: int, dtype: DTypeLike) -> dict:
  """Returns the shared memory that `write_output` needs."""
  return {
    "turned_smem": plgpu.SMEM((head_dim, num_queries), dtype),
    "out_smem": plgpu.SMEM((num_queries, head_dim), dtype),
  }


def load_queries(ref):
  """Loads a value for each query."""
  return plgpu.load(ref, layout=_QUERIES, optimized=False)


def store(ref, value) -> None:
  """Stores a value whose layout is not that of the memory."""
  if hasattr(plgpu, "store"):  # JAX 0.12 asks for leave to do it slowly
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def _by_blocks(acc, ref, head_dim: int):
  """Returns the blocks of acc, each with its rows of a reference."""
  places = softmax.row_blocks(head_dim)
  return [
    (rows, ref.at[pl.ds(start, size)])
    for rows, (start, size) in zip(acc, places, strict=True)
  ]


def write_partial(
  state: softmax.Summed, refs: Partials, at, store_rows=store
) -> None:
  """Writes what a program leaves of an item.

  Args:
    state: the softmax over its keys.
    refs: all partials.
    at: `FIRST` or `LAST`, and the program; or the item, and its part.
    store_rows: what stores rows of acc.
  """
  acc_gmem = refs.acc.at[at]
  for rows, place in _by_blocks(state.acc, acc_gmem, acc_gmem.shape[0]):
    store_rows(place, rows)
  store(refs.m.at[at], state.m)
  store(refs.l.at[at], state.l)


def write_output(
  state: softmax.Summed,
  sinks,
  out_gmem,
  lse_gmem,
  smem,
  store_rows=store,
):
  """Writes the output of an item, turned to a row for each query.

  Args:
    state: the softmax over all keys of the item.
    sinks: see `softmax.finish`.
    out_gmem: [num_rows, head_dim], in the dtype of the output.
    lse_gmem: f32[num_queries].
    smem: what `output_scratch` asks for.
    store_rows: see `write_partial`.
  """
  out, lse = softmax.finish(state, sinks)
  store(lse_gmem, lse)
  # The copy of the item before may still be reading.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  num_rows, head_dim = out_gmem.shape
  for rows, at in _by_blocks(out, smem.turned_smem, head_dim):
    store_rows(at, rows.astype(out_gmem.dtype))
  by_row = plgpu.Layout.WG_STRIDED(smem.out_smem.shape, vec_size=1)
  smem.out_smem[...] = plgpu.load(
    smem.turned_smem.T, layout=by_row, optimized=False
  )
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.out_smem.at[pl.ds(0, num_rows)], out_gmem)


def merge(
  plan: schedule.Plan,
  partials: Partials,
  sinks,
  out,
  lse,
  *,
  fixed_splits: bool,
  unroll: int,
  interpret,
):
  """Merges the partials of items that were split into their outputs.

  Args:
    plan: the schedule.
    partials: what the programs left.
    sinks: f32[num_kv_heads, num_queries], logits in base 2, or None.
    out: [num_seqs, num_kv_heads, num_rows, head_dim], whose missing items are
      filled in.
    lse: f32[num_seqs, num_kv_heads, num_queries], the same.
    fixed_splits: see `schedule.deal`.
    unroll: partials to load at once.
    interpret: parameters of the interpreter, or None.

  Returns:
    The output and the log-sum-exp.
  """
  *places, head_dim, num_queries = partials.acc.shape
  kernel = plgpu.kernel(
    functools.partial(
      _body, fixed_splits, unroll, sinks is not None, interpret is not None
    ),
    out_type=(),
    scratch_types=output_scratch(head_dim, num_queries, out.dtype),
    grid=(places[0] if fixed_splits else places[1],),
    grid_names=("program",),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
    kernel_name="merge_partials",
  )
  out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
  sinks = () if sinks is None else (sinks,)
  kernel(*plan, *partials, *sinks, out_ref, lse_ref)
  return out_ref[...], lse_ref[...]


class _Parts(NamedTuple):
  """An item whose partials a program merges."""

  exist: jax.Array
  seq: jax.Array
  head: jax.Array
  count: jax.Array
  place: Callable[[Any], tuple]  # of a partial: its indices


def _dealt_parts(plan: schedule.Plan) -> _Parts:
  """Returns the item in which the program's share begins, if it ends there."""
  firsts_gmem = plan.firsts
  program, num_programs = lax.axis_index("program"), firsts_gmem.shape[0] - 1
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  seq, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))
  line = schedule.Line(firsts_gmem[num_programs, 0], num_programs)
  item = begin - tile
  first = line.program_of(item)
  kind_of_first = jnp.where(line.start(first) < item, LAST, FIRST)

  def place(i):
    return jnp.where(i == 0, kind_of_first, FIRST), first + i

  exist = (begin < end) & (tile > 0) & (item + tiles <= end)
  return _Parts(exist, seq, head, program - first + 1, place)


def _fixed_parts(plan: schedule.Plan, num_kv_heads: int) -> _Parts:
  """Returns the program's item, if it has several parts."""
  item = lax.axis_index("program")
  seq = lax.div(item, jnp.int32(num_kv_heads))
  tiles = plan.starts[seq + 1] - plan.starts[seq]
  size = schedule.split_size(tiles)
  count = lax.div(tiles + size - 1, size)
  head = lax.rem(item, jnp.int32(num_kv_heads))
  return _Parts(count > 1, seq, head, count, lambda i: (item, i))


def _body(fixed_splits, unroll, has_sinks, interpreted, *refs, **smem):
  """Merges the partials of the program's item."""
  if not interpreted:
    gpu.follow_closely()
  starts_gmem, firsts_gmem, acc_gmem, m_gmem, l_gmem, *more = refs
  *sinks_gmem, out_gmem, lse_gmem = more
  plan = schedule.Plan(starts_gmem, firsts_gmem)
  all_partials = Partials(acc_gmem, m_gmem, l_gmem)
  parts = (
    _fixed_parts(plan, lse_gmem.shape[1])
    if fixed_splits
    else _dealt_parts(plan)
  )

  @pl.when(parts.exist)
  def _():
    def load(i):
      at = parts.place(jnp.minimum(i, parts.count - 1))
      return _load(all_partials, at, i < parts.count)

    def step(i, state):
      return _fold([state, *(load(i * unroll + j) for j in range(unroll))])

    num_steps = lax.div(parts.count + unroll - 1, jnp.int32(unroll))
    state = lax.fori_loop(0, num_steps, step, _nothing(*acc_gmem.shape[2:]))
    sinks = load_queries(sinks_gmem[0].at[parts.head]) if has_sinks else None
    at = parts.seq, parts.head
    write_output(
      state,
      sinks,
      out_gmem.at[at],
      lse_gmem.at[at],
      types.SimpleNamespace(**smem),
    )
    plgpu.wait_smem_to_gmem(0)


def _nothing(head_dim: int, num_queries: int) -> softmax.Summed:
  """Returns the softmax over no keys."""
  return softmax.Summed(
    softmax.zero_blocks(head_dim, num_queries),
    softmax.column(-jnp.inf, num_queries),
    softmax.column(0.0, num_queries),
  )


def _load(refs: Partials, at, exists) -> softmax.Summed:
  """Loads a partial; one that does not exist counts for nothing."""
  acc_gmem = refs.acc.at[at]
  blocks = softmax.row_blocks(acc_gmem.shape[0])
  acc = tuple(
    plgpu.load(
      acc_gmem.at[pl.ds(start, size)],
      layout=plgpu.Layout.WGMMA,
      optimized=False,
    )
    for start, size in blocks
  )
  m = load_queries(refs.m.at[at])
  nothing = jnp.where(exists, 0.0, -jnp.inf).astype(jnp.float32)
  m += lax.broadcast_in_dim(nothing, m.shape, [])
  return softmax.Summed(acc, m, load_queries(refs.l.at[at]))


def _fold(states: list[softmax.Summed]) -> softmax.Summed:
  """Returns the softmax over the keys of all."""
  top = functools.reduce(jnp.maximum, [state.m for state in states])
  shift = softmax.or_zero(top)
  alphas = [jnp.exp2(state.m - shift) for state in states]
  scaled = [
    softmax.scale_blocks(state.acc, alpha)
    for state, alpha in zip(states, alphas, strict=True)
  ]
  acc = tuple(
    functools.reduce(jnp.add, blocks) for blocks in zip(*scaled, strict=True)
  )
  roots = [softmax.half_factor(state.m - shift) for state in states]
  ls = [
    state.l * root * root for state, root in zip(states, roots, strict=True)
  ]
  l = functools.reduce(jnp.add, ls)
  return softmax.Summed(acc, top, l)
