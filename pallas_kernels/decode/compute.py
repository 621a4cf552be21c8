"""Decode: the consumer warpgroup, which attends each split tile by tile."""

import functools
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import tree_bits
from pallas_kernels.common.schedule import FIRST, LAST
from pallas_kernels.decode import fragments, load, partials, softmax, tile
from pallas_kernels.decode.partials import load_queries
from pallas_kernels.decode.problem import (
  DecodeProblem,
  Inputs,
  Outputs,
  Scratch,
)


def run(
  problem: DecodeProblem,
  inputs: Inputs,
  outputs: Outputs,
  smem: Scratch,
  for_each_split: Callable,
) -> None:
  """Runs the consumer warpgroup: attends all splits of the program.

  Args:
    problem: The static sizes.
    inputs: Arrays in global memory that are read.
    outputs: Arrays in global memory that are written.
    smem: Shared memory and barriers.
    for_each_split: Folds a function over the splits of the program.
  """
  attend = functools.partial(_attend_split, problem, inputs, outputs, smem)
  for_each_split(jnp.int32(0), attend)
  # Shared memory must outlive the copies of the last outputs.
  plgpu.wait_smem_to_gmem(0)


def _attend_split(problem, inputs, outputs, smem, split, num_before):
  """Attends the tiles of a split, and writes its output or its partial.

  Args:
    problem: The static sizes.
    inputs: Arrays that are read.
    outputs: Arrays that are written.
    smem: Shared memory and barriers.
    split: The split.
    num_before: Tiles of previous splits, from which stages are numbered.

  Returns:
    `num_before` of the next split.
  """
  tiles, num_tiles = load.visited(problem, inputs, split)

  # 1. Wait for Q. wgmma reads Q from tiles in shared memory. A row-major Q is
  # moved into tiles first, which releases the buffer that TMA fills.
  plgpu.barrier_wait(smem.q_loaded)
  if not problem.loads_tiles_of_q:
    _tile_queries(problem, smem)

  # 2. Load the options of the item's queries, for all of its tiles.
  slopes = tree = None
  if inputs.alibi_slopes is not None:
    slopes = load_queries(inputs.alibi_slopes.at[split.head])
  if inputs.tree is not None:
    words = load_queries(inputs.tree.of_queries.at[split.row])
    tree = tree_bits.Few(words, inputs.tree.of_seqs[split.row])

  # 3. Fold the KV tiles into the softmax, as the producer delivers them.
  def fold(i, base, ids, state):
    at = num_before + i, base, ids
    return tile.fold(problem, smem, tiles, slopes, tree, *at, state)

  state = softmax.init(
    problem.head_dim, problem.config.block_kv, problem.num_queries
  )
  state = load.for_each_tile(
    problem, inputs, split, tiles, num_tiles, state, fold
  )

  # 4. Release Q only now if wgmma read it from the buffer that TMA fills.
  if problem.loads_tiles_of_q:
    plgpu.barrier_arrive(smem.q_consumed)

  # 5. Write the output of a whole item, or the partial state of a split item.
  _write(problem, inputs, outputs, smem, split, softmax.sum_rows(state))
  return num_before + num_tiles


def _tile_queries(problem, smem):
  """Moves Q from row-major shared memory through registers into wgmma tiles."""
  if problem.is_permuted:
    q = fragments.load_rows(smem.q_row_major.T)
  else:
    q = plgpu.load(
      smem.q_row_major.T, layout=plgpu.Layout.WGMMA, optimized=False
    )
  smem.q.T[...] = problem.as_operand(q)
  # Makes Q visible to wgmma, and all warps finish the load before the arrival
  # below lets the producer overwrite the buffer.
  plgpu.commit_smem()
  plgpu.barrier_arrive(smem.q_consumed)


def _write(problem, inputs, outputs, smem, split, state):
  """Writes the output if the split is a whole item, else its partial state."""
  store = fragments.store_rows if problem.is_permuted else partials.store

  @pl.when(split.is_whole)
  def _():
    sinks = None
    if inputs.sinks is not None:
      sinks = load_queries(inputs.sinks.at[split.head])
    at = split.row, split.head
    arrays = outputs.out.at[at], outputs.lse.at[at]
    partials.write_output(state, sinks, *arrays, smem.output, store)

  @pl.when(jnp.logical_not(split.is_whole))
  def _():
    kind = jnp.where(split.nth == 0, FIRST, LAST)
    at = kind, lax.axis_index("program")
    if problem.spec.batch_invariant:
      at = split.row * problem.num_kv_heads + split.head, split.nth_of_item
    partials.write_partial(state, outputs.partials, at, store)
