"""Decode: the producer warpgroup, and the tile loop that both warpgroups share.

Within a split, the four warps of the producer run their own tile loops
(`warps`). They synchronise between splits.
"""

import functools
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import kv_tiles, warps
from pallas_kernels.common.warps import Copies
from pallas_kernels.decode import ring
from pallas_kernels.decode.problem import DecodeProblem, Inputs, Scratch


def run(
  problem: DecodeProblem,
  inputs: Inputs,
  smem: Scratch,
  for_each_split: Callable,
) -> None:
  """Runs the producer warpgroup: copies Q, K and V of all splits.

  Args:
    problem: The static sizes.
    inputs: Arrays in global memory.
    smem: Shared memory and barriers.
    for_each_split: Folds a function over the splits of the program.
  """
  chunks = list(range(problem.num_chunks))
  for_each_warp = functools.partial(
    warps.for_each_warp,
    Copies(k=chunks, v=chunks, q=[(0, 0)]),  # Q is one copy
    first_thread=1,
    interpret=problem.interpret,
  )
  layer = None if inputs.layer is None else inputs.layer[0]

  # 1. Copy split by split. `num_before` counts the tiles of previous splits: it
  # determines the stage and the barrier phase of each tile.
  def load_split(split, carry):
    num_before, _ = carry
    tiles, num_tiles = visited(problem, inputs, split)
    at = split, tiles, num_before, num_tiles
    load = functools.partial(_load_split, problem, inputs, smem, layer, at)
    for_each_warp(load)
    return num_before + num_tiles, split.nth + 1

  count = for_each_split((jnp.int32(0), jnp.int32(0)), load_split)

  # 2. Wait for the consumer to read the last tiles.
  for_each_warp(functools.partial(_drain, problem, smem, *count))


def visited(problem: DecodeProblem, inputs: Inputs, split):
  """Returns the visited tiles of a split's sequence, and how many to attend.

  The schedule has one tile for a sequence without visible tokens; here it is 0.

  Args:
    problem: The static sizes.
    inputs: Arrays in global memory.
    split: The split.
  """
  lens = [inputs.kv_lens[split.row]]
  if inputs.q_lens is not None:
    lens.append(inputs.q_lens[split.row])
  if inputs.tree is not None:
    lens.append(inputs.tree.of_seqs[split.row])
  tiles = problem.visit(*lens)
  return tiles, jnp.where(tiles.num_visited > 0, split.num_tiles, 0)


def for_each_tile(
  problem, inputs, split, tiles, num_tiles, carry, step, chunks=None
):
  """Folds `step(i, base, ids, carry)` over the tiles of a split.

  `i` counts the tiles of the split, `base` is the first position of a tile, and
  `ids` are the page ids of its chunks.

  Args:
    problem: The static sizes.
    inputs: Arrays in global memory.
    split: The split.
    tiles: The visited tiles of its sequence.
    num_tiles: Tiles to attend.
    carry: The initial carry.
    step: Returns the next carry.
    chunks: The chunks whose page ids `step` gets; None: all.

  Returns:
    The last carry.
  """
  if chunks is None:
    chunks = range(problem.num_chunks)

  def base(i):
    return tiles.base(split.first + i)

  def page_ids(i):
    sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
    table = inputs.page_indices
    return kv_tiles.page_ids(table, split.row, base(i), chunks, **sizes)

  def body(i, state):
    carry, ids = state
    # Load the next page ids first: their latency overlaps with the waits below.
    next_ids = page_ids(i + 1)
    return step(i, base(i), ids, carry), next_ids

  return lax.fori_loop(0, num_tiles, body, (carry, page_ids(0)))[0]


def _load_split(problem, inputs, smem, layer, at, copies):
  """Issues the copies of one warp: Q, and the K and V tiles of a split."""
  split, tiles, num_before, num_tiles = at
  # 1. Q first, since the consumer needs it for the first tile.
  if copies.q:
    _load_queries(problem, inputs, smem, split)

  # 2. K before V, in the order in which the consumer needs them.
  def load(i, base, ids, carry):
    k_pages, v_pages = copies.pages(ids)
    at = split.head, layer, num_before + i, base
    ring.load(problem, inputs.k, smem.k, at, k_pages)
    ring.load(problem, inputs.v, smem.v, at, v_pages)
    return carry

  chunks = copies.chunks
  for_each_tile(problem, inputs, split, tiles, num_tiles, (), load, chunks)


def _load_queries(problem, inputs, smem, split):
  """Copies Q after the consumer has read Q of the previous split."""

  @pl.when(split.nth > 0)
  def _():
    plgpu.barrier_wait(smem.q_consumed)

  item = split.row * problem.num_kv_heads + split.head
  if problem.loads_tiles_of_q:
    row, target = item * problem.num_queries, smem.q
  else:
    row, target = item * problem.num_rows, smem.q_row_major
  rows = inputs.q.at[pl.ds(row, problem.num_queries)]
  plgpu.copy_gmem_to_smem(rows, target, smem.q_loaded)


def _drain(problem, smem, num_tiles, num_splits, copies):
  """Waits until the consumer has read all tiles and Q; see `ring.drain`."""
  ring.drain(problem, smem, num_tiles, copies)
  if copies.q:
    pl.when(num_splits > 0)(lambda: plgpu.barrier_wait(smem.q_consumed))
