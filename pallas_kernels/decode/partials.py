"""Decode: writes outputs of whole items and partial states of split items.

A program that attended a whole item writes its output. Otherwise it writes a
partial softmax state (acc, m, l), as the first or the last of its items. A
second kernel merges the partials. It has one program per program of the
schedule: if an item begins before the program's range and ends in it, the
program folds the partials of all programs that attended the item, in order, and
writes the output in place.

  programs  |   4   |   5   |   6   |   7   |
  items         a  |          b       | c |     6 merges b: last of 4, first
  partials    F|  L|F       |F     |L         of 5 and first of 6

With fixed splits, partials are stored by item and split, and the merging kernel
has one program per item. It folds the splits in the same order and in the same
groups, whatever else is in the batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common import pdl, refs, schedule
from pallas_kernels.common.base2 import Softmax
from pallas_kernels.common.schedule import FIRST, LAST
from pallas_kernels.common.types import ArrayOrRef, Ref
from pallas_kernels.decode import softmax
from pallas_kernels.decode.softmax import QUERIES


class Partials(NamedTuple):
  """Partial softmax states of the first and the last item of each program.

  With fixed splits, the leading axes are [items, splits] instead.
  """

  acc: ArrayOrRef  # f32[2, num_programs, head_dim, num_queries]
  m: ArrayOrRef  # f32[2, num_programs, num_queries]
  l: ArrayOrRef  # f32[2, num_programs, num_queries]

  @staticmethod
  def types(
    partial_axes: tuple[int, int], head_dim: int, num_queries: int
  ) -> "Partials":
    """Declares the partials as outputs of the kernel.

    Args:
      partial_axes: The leading axes: (2, num_programs), or (items, splits per
        item).
      head_dim: Elements per head.
      num_queries: Queries per item, padded.
    """
    rows = *partial_axes, num_queries
    return Partials(
      acc=refs.output((*partial_axes, head_dim, num_queries), jnp.float32),
      m=refs.output(rows, jnp.float32),
      l=refs.output(rows, jnp.float32),
    )


class OutputScratch(NamedTuple):
  """Shared memory to transpose the output of an item."""

  by_column: Ref  # [head_dim, num_queries]
  by_row: Ref  # [num_queries, head_dim]

  @staticmethod
  def types(
    head_dim: int, num_queries: int, dtype: DTypeLike
  ) -> "OutputScratch":
    """Declares the shared memory."""
    return OutputScratch(
      by_column=refs.smem((head_dim, num_queries), dtype),
      by_row=refs.smem((num_queries, head_dim), dtype),
    )


def load_queries(ref):
  """Loads one value per query into registers, in layout `QUERIES`."""
  return plgpu.load(ref, layout=QUERIES, optimized=False)


def store(ref, value) -> None:
  """Stores registers whose layout does not match that of the memory."""
  if hasattr(plgpu, "store"):  # JAX 0.12 requires optimized=False for that
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def _by_blocks(acc, ref, head_dim: int):
  """Pairs each block of acc with its rows of a reference."""
  blocks = softmax.row_blocks(head_dim)
  return [
    (rows, ref.at[pl.ds(start, size)])
    for rows, (start, size) in zip(acc, blocks, strict=True)
  ]


def write_partial(
  state: Softmax, partials: Partials, at, store_rows=store
) -> None:
  """Writes the partial softmax state of a split.

  Args:
    state: The softmax state over the keys of the split.
    partials: All partials.
    at: (`FIRST` or `LAST`, program); with fixed splits (item, split).
    store_rows: Stores rows of acc.
  """
  acc_gmem = partials.acc.at[at]
  for rows, block_gmem in _by_blocks(state.acc, acc_gmem, acc_gmem.shape[0]):
    store_rows(block_gmem, rows)
  store(partials.m.at[at], state.m)
  store(partials.l.at[at], state.l)


def write_output(
  state: Softmax,
  sinks,
  out_gmem,
  lse_gmem,
  smem: OutputScratch,
  store_rows=store,
) -> None:
  """Writes the output of an item, transposed to one row per query.

  Args:
    state: The softmax state over all keys of the item.
    sinks: See `base2.finish`.
    out_gmem: [num_rows, head_dim], in the dtype of the output.
    lse_gmem: f32[num_queries].
    smem: Shared memory for the transposition.
    store_rows: See `write_partial`.
  """
  # 1. Normalise. The log-sum-exp goes to global memory directly.
  out, lse = softmax.finish(state, sinks)
  store(lse_gmem, lse)
  # 2. Transpose in shared memory. The copy of the previous output may still
  # read it.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  num_rows, head_dim = out_gmem.shape
  for rows, at in _by_blocks(out, smem.by_column, head_dim):
    store_rows(at, rows.astype(out_gmem.dtype))
  layout = plgpu.Layout.WG_STRIDED(smem.by_row.shape, vec_size=1)
  smem.by_row[...] = plgpu.load(
    smem.by_column.T, layout=layout, optimized=False
  )
  # 3. Start the copy, without the padding rows. Nothing waits for it yet.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.by_row.at[pl.ds(0, num_rows)], out_gmem)


class _Inputs(NamedTuple):
  """Operands of the merging kernel; it updates `out` and `lse` in place."""

  splits: schedule.Splits
  partials: Partials
  sinks: ArrayOrRef | None
  out: Ref
  lse: Ref


def merge_partials(
  splits: schedule.Splits,
  partials: Partials,
  sinks,
  out,
  lse,
  *,
  fixed_splits: bool,
  unroll: int,
  interpret: plgpu.InterpretGPUParams | None,
):
  """Merges the partials of split items, and writes their outputs.

  Args:
    splits: The schedule.
    partials: Partials that the programs wrote.
    sinks: f32[num_kv_heads, num_queries], logits in base 2, or None.
    out: [num_seqs, num_kv_heads, num_rows, head_dim], without the outputs of
      split items; updated in place.
    lse: f32[num_seqs, num_kv_heads, num_queries], likewise.
    fixed_splits: See `schedule.split_evenly`.
    unroll: Partials to load at once.
    interpret: Parameters of the interpreter; None on a GPU.

  Returns:
    The complete output and log-sum-exp.
  """
  *partial_axes, head_dim, num_queries = partials.acc.shape
  kernel = plgpu.kernel(
    functools.partial(_body, fixed_splits, unroll, interpret is not None),
    out_type=(),
    scratch_types={
      "smem": OutputScratch.types(head_dim, num_queries, out.dtype)
    },
    grid=(partial_axes[0] if fixed_splits else partial_axes[1],),
    grid_names=("program",),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
    kernel_name="merge_partials",
  )
  out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
  kernel(_Inputs(splits, partials, sinks, out_ref, lse_ref))
  return out_ref[...], lse_ref[...]


class _SplitItem(NamedTuple):
  """The split item that a program merges, if it exists."""

  exists: jax.Array
  seq: jax.Array
  head: jax.Array
  count: jax.Array  # number of partials
  index_of: Callable[[jax.Array], tuple]  # of the i-th partial in `Partials`


def _item_that_ends_here(splits: schedule.Splits) -> _SplitItem:
  """Returns the item that begins before the program's range and ends in it."""
  firsts_gmem = splits.firsts
  program, num_programs = lax.axis_index("program"), firsts_gmem.shape[0] - 1
  begin, end = firsts_gmem[program, 0], firsts_gmem[program + 1, 0]
  seq, head, tile, tiles = (firsts_gmem[program, i] for i in range(1, 5))
  ranges = schedule.TileRanges(firsts_gmem[num_programs, 0], num_programs)
  item = begin - tile
  first = ranges.program_of(item)
  kind_of_first = jnp.where(ranges.start(first) < item, LAST, FIRST)

  def index_of(i):
    return jnp.where(i == 0, kind_of_first, FIRST), first + i

  exists = (begin < end) & (tile > 0) & (item + tiles <= end)
  return _SplitItem(exists, seq, head, program - first + 1, index_of)


def _own_item(splits: schedule.Splits, num_kv_heads: int) -> _SplitItem:
  """Returns the program's item, with fixed splits, if it has several splits."""
  item = lax.axis_index("program")
  seq = lax.div(item, jnp.int32(num_kv_heads))
  tiles = splits.starts[seq + 1] - splits.starts[seq]
  size = schedule.split_size(tiles)
  count = lax.div(tiles + size - 1, size)
  head = lax.rem(item, jnp.int32(num_kv_heads))
  return _SplitItem(count > 1, seq, head, count, lambda i: (item, i))


def _body(
  fixed_splits: bool,
  unroll: int,
  interpreted: bool,
  inputs: _Inputs,
  smem: OutputScratch,
):
  """The program: merges the partials of one item, if it was split."""
  # 1. Wait for the attention kernel, which writes the partials.
  if not interpreted:
    pdl.overlap_with_previous_kernel()
  # 2. Find the item. Most programs have none and end here.
  split = (
    _own_item(inputs.splits, inputs.lse.shape[1])
    if fixed_splits
    else _item_that_ends_here(inputs.splits)
  )

  @pl.when(split.exists)
  def _():
    def load(i):
      at = split.index_of(jnp.minimum(i, split.count - 1))
      return _load(inputs.partials, at, i < split.count)

    # 3. Fold the partials, `unroll` of them per step: their loads overlap.
    def step(i, state):
      more = (load(i * unroll + j) for j in range(unroll))
      return softmax.merge([state, *more])

    num_steps = lax.div(split.count + unroll - 1, jnp.int32(unroll))
    empty = softmax.empty(*inputs.partials.acc.shape[2:])
    state = lax.fori_loop(0, num_steps, step, empty)

    # 4. Write the output in place.
    sinks = None
    if inputs.sinks is not None:
      sinks = load_queries(inputs.sinks.at[split.head])
    at = split.seq, split.head
    write_output(state, sinks, inputs.out.at[at], inputs.lse.at[at], smem)
    plgpu.wait_smem_to_gmem(0)


def _load(partials: Partials, at, exists) -> Softmax:
  """Loads a partial; m is -inf, thus its weight 0, if it does not exist."""
  acc_gmem = partials.acc.at[at]
  blocks = softmax.row_blocks(acc_gmem.shape[0])
  acc = tuple(
    plgpu.load(
      acc_gmem.at[pl.ds(start, size)],
      layout=plgpu.Layout.WGMMA,
      optimized=False,
    )
    for start, size in blocks
  )
  m = load_queries(partials.m.at[at])
  offset = jnp.where(exists, 0.0, -jnp.inf).astype(jnp.float32)
  m += lax.broadcast_in_dim(offset, m.shape, [])
  return Softmax(acc, m, load_queries(partials.l.at[at]))
