"""The memory warpgroup of the decode kernel, and the way both warpgroups go.

The warps that copy go through the tiles of a piece each on its own (`warps`),
and meet between pieces.
"""

import functools
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import kv_tiles, warps
from pallas_kernels.common.warps import Share
from pallas_kernels.decode import ring
from pallas_kernels.decode.problem import Problem


def run(problem: Problem, gmem, smem, for_each_piece: Callable) -> None:
  """Loads what a program attends.

  Args:
    problem: what is static.
    gmem: arrays in memory of the GPU.
    smem: what `scratch` asks for.
    for_each_piece: folds a function over the program's pieces.
  """
  chunks = list(range(problem.num_chunks))
  for_each_warp = functools.partial(
    warps.for_each_warp,
    Share(k=chunks, v=chunks, q=[None]),  # Q is one copy
    first_thread=1,
    interpret=problem.interpret,
  )

  def load_piece(piece, carry):
    num_before, _ = carry
    tiles, num_tiles = visited(problem, gmem, piece)
    at = piece, tiles, num_before, num_tiles
    for_each_warp(functools.partial(_load_piece, problem, gmem, smem, at))
    return num_before + num_tiles, piece.nth + 1

  count = for_each_piece((jnp.int32(0), jnp.int32(0)), load_piece)
  for_each_warp(functools.partial(_drain, problem, smem, *count))


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


def for_each_tile(
  problem, gmem, piece, tiles, num_tiles, carry, step, chunks=None
):
  """Folds `step(i, base, ids, carry)` over the tiles of a piece.

  The page ids of the next tile are on their way while a step waits. They are
  those of `chunks`, of all if None.
  """
  if chunks is None:
    chunks = range(problem.num_chunks)

  def base(i):
    return tiles.base(piece.first + i)

  def page_ids(i):
    sizes = dict(chunk=problem.chunk, page_size=problem.page_size)
    return kv_tiles.page_ids(gmem.table, piece.seq, base(i), chunks, **sizes)

  def take(i, state):
    carry, ids = state
    next_ids = page_ids(i + 1)
    return step(i, base(i), ids, carry), next_ids

  return lax.fori_loop(0, num_tiles, take, (carry, page_ids(0)))[0]


def _load_piece(problem, gmem, smem, at, share):
  """Copies a share of Q, and of the tiles of K and V into their rings."""
  piece, tiles, num_before, num_tiles = at
  if share.q:
    _load_queries(problem, gmem, smem, piece)

  def load(i, base, ids, carry):
    pages, nth = share.pages(ids), num_before + i
    ring.load(problem, gmem, smem, piece.head, nth, base, pages)
    return carry

  for_each_tile(problem, gmem, piece, tiles, num_tiles, (), load, share.chunks)


def _load_queries(problem, gmem, smem, piece):
  """Copies Q, when that of the piece before was taken."""

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


def _drain(problem, smem, num_tiles, num_pieces, share):
  """Waits until all was taken, as in `ring.drain`."""
  ring.drain(problem, smem, num_tiles, share)
  if share.q:
    pl.when(num_pieces > 0)(lambda: plgpu.barrier_wait(smem.q_consumed))
