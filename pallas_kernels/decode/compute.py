"""The compute warpgroup of the decode kernel: its pieces, tile by tile."""

import functools
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import tree_bits
from pallas_kernels.decode import fragments, load, partials, softmax, tile
from pallas_kernels.decode.problem import Problem


def run(problem: Problem, gmem, smem, for_each_piece: Callable) -> None:
  """Attends what a program has a share of; see `load.run`."""
  for_each_piece(
    jnp.int32(0), functools.partial(_attend_piece, problem, gmem, smem)
  )
  plgpu.wait_smem_to_gmem(0)


def _attend_piece(problem, gmem, smem, piece, num_before):
  """Attends the tiles of a piece, and writes its output or its partial."""
  tiles, num_tiles = load.visited(problem, gmem, piece)
  plgpu.barrier_wait(smem.q_loaded)
  if not problem.loads_tiles_of_q:
    if problem.is_interleaved:
      q = fragments.load_rows(smem.loaded_q_smem.T)
    else:
      q = plgpu.load(
        smem.loaded_q_smem.T, layout=plgpu.Layout.WGMMA, optimized=False
      )
    smem.q_smem.T[...] = problem.as_operand(q)
    # For wgmma to see it, and for the next Q not to overtake the load.
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.q_consumed)

  slopes = tree = None
  if problem.has_alibi:
    slopes = partials.load_queries(gmem.alibi_slopes.at[piece.head])
  if problem.has_tree:
    words = partials.load_queries(gmem.tree.at[piece.seq])
    tree = tree_bits.Few(words, gmem.tree_of_seqs[piece.seq])

  def fold(i, base, ids, state):
    at = num_before + i, base, ids
    return tile.fold(problem, smem, tiles, slopes, tree, *at, state)

  state = softmax.init(
    problem.head_dim, problem.config.block_kv, problem.num_queries
  )
  state = load.for_each_tile(
    problem, gmem, piece, tiles, num_tiles, state, fold
  )
  if problem.loads_tiles_of_q:
    plgpu.barrier_arrive(smem.q_consumed)
  state = softmax.sum_rows(state)
  store = fragments.store_rows if problem.is_interleaved else partials.store

  @pl.when(piece.is_whole)
  def _():
    sinks = None
    if problem.has_sinks:
      sinks = partials.load_queries(gmem.sinks.at[piece.head])
    at = piece.seq, piece.head
    refs = gmem.out.at[at], gmem.lse.at[at]
    partials.write_output(state, sinks, *refs, smem, store)

  @pl.when(jnp.logical_not(piece.is_whole))
  def _():
    kind = jnp.where(piece.nth == 0, partials.FIRST, partials.LAST)
    at = kind, lax.axis_index("program")
    if problem.batch_invariant:
      at = piece.seq * problem.num_kv_heads + piece.head, piece.split
    refs = partials.Partials(gmem.acc, gmem.m, gmem.l)
    partials.write_partial(state, refs, at, store)

  return num_before + num_tiles
