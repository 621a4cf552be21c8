"""The memory warpgroup of the decode kernel, and the way both warpgroups go."""

import functools
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import kv_ring
from pallas_kernels.decode_problem import Problem


def run(problem: Problem, gmem, smem, for_each_piece: Callable) -> None:
  """Loads what a program attends.

  Args:
    problem: what is static.
    gmem: arrays in memory of the GPU.
    smem: what `scratch` asks for.
    for_each_piece: folds a function over the program's pieces.
  """
  num_tiles, num_pieces = for_each_piece(
    (jnp.int32(0), jnp.int32(0)),
    functools.partial(_load_piece, problem, gmem, smem),
  )

  # As in `kv_ring.drain`.
  @pl.when(num_pieces > 0)
  def _():
    plgpu.barrier_wait(smem.q_consumed)

  kv_ring.drain(problem, smem, num_tiles)


def visited(problem, gmem, piece):
  """Returns the tiles of a piece's sequence, and how many to attend.

  There are none in a sequence without tokens, whatever the schedule says.
  """
  lens = [gmem.lens[piece.seq]]
  if problem.has_q_lens:
    lens.append(gmem.q_lens[piece.seq])
  if problem.has_tree:
    lens.append(gmem.tree_of_seqs[piece.seq])
  tiles = problem.visit(*lens)
  return tiles, jnp.where(tiles.num_visited > 0, piece.num_tiles, 0)


def for_each_tile(problem, gmem, piece, tiles, num_tiles, carry, step):
  """Folds `step(i, base, ids, carry)` over the tiles of a piece.

  The page ids of the next tile are on their way while a step waits.
  """

  def base(i):
    return tiles.base(piece.first + i)

  def take(i, state):
    carry, ids = state
    next_ids = kv_ring.page_ids(problem, gmem.table, piece.seq, base(i + 1))
    return step(i, base(i), ids, carry), next_ids

  ids = kv_ring.page_ids(problem, gmem.table, piece.seq, base(0))
  return lax.fori_loop(0, num_tiles, take, (carry, ids))[0]


def _load_piece(problem, gmem, smem, piece, carry):
  """Copies Q, and the tiles of K and V into their rings."""
  num_before, _ = carry
  tiles, num_tiles = visited(problem, gmem, piece)

  @pl.when(piece.nth > 0)
  def _():
    plgpu.barrier_wait(smem.q_consumed)

  item = piece.seq * problem.num_kv_heads + piece.head
  if problem.loads_tiles_of_q:
    row, place = item * problem.num_queries, smem.q_smem
  else:
    row, place = item * problem.num_rows, smem.loaded_q_smem
  rows = gmem.q.at[pl.ds(row, problem.num_queries)]
  plgpu.copy_gmem_to_smem(rows, place, smem.q_loaded)

  def load(i, base, ids, carry):
    nth = num_before + i
    kv_ring.load(problem, gmem, smem, piece.head, nth, base, ids)
    return carry

  for_each_tile(problem, gmem, piece, tiles, num_tiles, (), load)
  return num_before + num_tiles, piece.nth + 1
