"""Distributes the copies of the producer warpgroup over its four warps.

Issued by the whole warpgroup, each copy would run on four warps although one
thread suffices, take issue slots from the consumer warps, and synchronise all
four. Therefore each warp runs its own loop over the tiles of a work item and
issues a quarter of the copies, round robin:

  chunks   K 0   K 1   V 0   V 1   Q
  warp      0     1     2     3    0
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.common.gpu import WARPS


class Copies(NamedTuple):
  """The chunks of each KV tile and the parts of Q that a warp copies.

  Or a whole warpgroup, before its copies are distributed.
  """

  k: list[int]  # chunk numbers in a tile of K
  v: list[int]  # chunk numbers in a tile of V
  q: list[tuple[int, int]]  # parts of Q, in the caller's numbering

  @property
  def chunks(self) -> list[int]:
    """Chunk numbers that occur in K or in V, sorted."""
    return sorted({*self.k, *self.v})

  def pages[P](self, ids: list[P]) -> tuple[dict[int, P], dict[int, P]]:
    """Returns the page id of each chunk of K and of each chunk of V.

    Args:
      ids: Page ids of `chunks`, in that order.
    """
    page_of = dict(zip(self.chunks, ids, strict=True))
    return {j: page_of[j] for j in self.k}, {j: page_of[j] for j in self.v}


def num_threads(interpret: plgpu.InterpretGPUParams | None) -> int:
  """Returns how many Pallas threads represent the producer warpgroup.

  One on a GPU. The interpreter runs the warps of a warpgroup one after the
  other, which would deadlock. There, a single thread issues all copies; or one
  thread per warp if races are to be detected, which takes longer.

  Args:
    interpret: Parameters of the interpreter; None on a GPU.
  """
  return WARPS if interpret is not None and interpret.detect_races else 1


def for_each_warp(
  copies: Copies,
  step: Callable[[Copies], None],
  *,
  first_thread: int,
  interpret: plgpu.InterpretGPUParams | None,
) -> None:
  """Calls `step` in each warp, without synchronisation between warps.

  A warp must not wait on the barriers of a ring to which it copies nothing. The
  ring does not wait for that warp either, so the warp could miss a phase of the
  barrier.

  Args:
    copies: All copies of the warpgroup.
    step: Called with the copies of one warp.
    first_thread: Index of the warpgroup's first Pallas thread (`num_threads`).
    interpret: Parameters of the interpreter; None on a GPU.
  """

  def run_warp(warp):
    for nth in range(WARPS):
      part = part_of(copies, nth)
      pl.when(warp == nth)(functools.partial(step, part))

  if interpret is None:
    plgpu.warp_map(run_warp)
  elif num_threads(interpret) == 1:
    step(copies)
  else:
    run_warp(lax.axis_index("warpgroup") - first_thread)


def part_of(copies: Copies, warp: int) -> Copies:
  """Returns the copies of one warp: chunks and parts are assigned round robin.

  Args:
    copies: All copies of the warpgroup.
    warp: Index of the warp in the warpgroup.
  """

  def own[T](tasks: list[T], num_before: int) -> list[T]:
    numbered = enumerate(tasks, num_before)
    return [task for i, task in numbered if i % WARPS == warp]

  num_k, num_v = len(copies.k), len(copies.v)
  return Copies(
    own(copies.k, 0), own(copies.v, num_k), own(copies.q, num_k + num_v)
  )
