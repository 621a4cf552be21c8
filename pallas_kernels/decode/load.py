"""Decode: the producer warpgroup, and the tile loop that both warpgroups share.

The warps that copy go through the tiles of a split each on its own (`warps`),
and meet between splits.
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
  """Loads what a program attends.

  Args:
    problem: The static facts.
    inputs: Arrays in global memory.
    smem: Shared memory and barriers.
    for_each_split: Folds a function over the program's splits.
  """
  chunks = list(range(problem.num_chunks))
  for_each_warp = functools.partial(
    warps.for_each_warp,
    Copies(k=chunks, v=chunks, q=[(0, 0)]),  # Q is one copy
    first_thread=1,
    interpret=problem.interpret,
  )
  layer = None if inputs.layer is None else inputs.layer[0]

  def load_split(split, carry):
    num_before, _ = carry
    tiles, num_tiles = visited(problem, inputs, split)
    at = split, tiles, num_before, num_tiles
    load = functools.partial(_load_split, problem, inputs, smem, layer, at)
    for_each_warp(load)
    return num_before + num_tiles, split.nth + 1

  count = for_each_split((jnp.int32(0), jnp.int32(0)), load_split)
  for_each_warp(functools.partial(_drain, problem, smem, *count))


def visited(problem: DecodeProblem, inputs: Inputs, split):
  """Returns the tiles of a split's sequence, and how many to attend.

  There are none in a sequence without tokens, whatever the schedule says.
  """
  lens = [inputs.kv_lens[split.seq]]
  if inputs.q_lens is not None:
    lens.append(inputs.q_lens[split.seq])
  if inputs.tree is not None:
    lens.append(inputs.tree.of_seqs[split.seq])
  tiles = problem.visit(*lens)
  return tiles, jnp.where(tiles.num_visited > 0, split.num_tiles, 0)


def for_each_tile(
  problem, inputs, split, tiles, num_tiles, carry, step, chunks=None
):
  """Folds `step(i, base, ids, carry)` over the tiles of a split.

  The page ids of the next tile are loaded while a step waits. They are those of
  `chunks`, of all if None.
  """
  if chunks is None:
    chunks = range(problem.num_chunks)

  def base(i):
    return tiles.base(split.first + i)

  def page_ids(i):
    sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
    table = inputs.page_indices
    return kv_tiles.page_ids(table, split.seq, base(i), chunks, **sizes)

  def take(i, state):
    carry, ids = state
    next_ids = page_ids(i + 1)
    return step(i, base(i), ids, carry), next_ids

  return lax.fori_loop(0, num_tiles, take, (carry, page_ids(0)))[0]


def _load_split(problem, inputs, smem, layer, at, copies):
  """Copies what a warp copies: Q, and of the tiles of K and V."""
  split, tiles, num_before, num_tiles = at
  if copies.q:
    _load_queries(problem, inputs, smem, split)

  def load(i, base, ids, carry):
    k_pages, v_pages = copies.pages(ids)
    at = split.head, layer, num_before + i, base
    ring.load(problem, inputs.k, smem.k, at, k_pages)
    ring.load(problem, inputs.v, smem.v, at, v_pages)
    return carry

  chunks = copies.chunks
  for_each_tile(problem, inputs, split, tiles, num_tiles, (), load, chunks)


def _load_queries(problem, inputs, smem, split):
  """Copies Q, once Q of the split before was read."""

  @pl.when(split.nth > 0)
  def _():
    plgpu.barrier_wait(smem.q_consumed)

  item = split.seq * problem.num_kv_heads + split.head
  if problem.loads_tiles_of_q:
    row, place = item * problem.num_queries, smem.q
  else:
    row, place = item * problem.num_rows, smem.loaded_q
  rows = inputs.q.at[pl.ds(row, problem.num_queries)]
  plgpu.copy_gmem_to_smem(rows, place, smem.q_loaded)


def _drain(problem, smem, num_tiles, num_splits, copies):
  """Waits until everything was read, as in `ring.drain`."""
  ring.drain(problem, smem, num_tiles, copies)
  if copies.q:
    pl.when(num_splits > 0)(lambda: plgpu.barrier_wait(smem.q_consumed))
