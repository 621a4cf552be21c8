"""Splits the copies of a producer warpgroup between its warps.

Issued by the whole warpgroup, each copy would run on four warps although one
thread suffices, take issue slots from the warps that compute, and synchronise
all four. So each warp runs its own loop over the tiles of an item, or of a
split, and copies only a part:

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
  """Which chunks of each tile, and parts of Q, a warp or a warpgroup copies."""

  k: list[int]  # chunks
  v: list[int]
  q: list[tuple[int, int]]  # parts, as the caller numbers them

  @property
  def chunks(self) -> list[int]:
    """Chunks of K or of V."""
    return sorted({*self.k, *self.v})

  def pages[P](self, ids: list[P]) -> tuple[dict[int, P], dict[int, P]]:
    """Returns the page of each chunk of K, and of V; `ids` are of `chunks`."""
    page_of = dict(zip(self.chunks, ids, strict=True))
    return {j: page_of[j] for j in self.k}, {j: page_of[j] for j in self.v}


def num_threads(interpret: plgpu.InterpretGPUParams | None) -> int:
  """Returns how many threads of a kernel stand for the warpgroup.

  The interpreter runs one warp after the other, which would deadlock. There the
  warpgroup copies everything, or, where races are looked for, a thread stands
  for each warp, which takes longer.

  Args:
    interpret: Parameters of the interpreter, None on a GPU.
  """
  return WARPS if interpret is not None and interpret.detect_races else 1


def for_each_warp(
  copies: Copies,
  step: Callable[[Copies], None],
  *,
  first_thread: int,
  interpret: plgpu.InterpretGPUParams | None,
) -> None:
  """Calls `step(part of the copies)` in each warp, without synchronising them.

  A warp must not wait for a ring to which it copies nothing: no other thread
  waits for that warp, so it could miss a phase of the barrier.

  Args:
    copies: What the warpgroup copies.
    step: The function.
    first_thread: The first of the warpgroup's threads, see `num_threads`.
    interpret: Parameters of the interpreter, None on a GPU.
  """

  def go(warp):
    for nth in range(WARPS):
      part = part_of(copies, nth)
      pl.when(warp == nth)(functools.partial(step, part))

  if interpret is None:
    plgpu.warp_map(go)
  elif num_threads(interpret) == 1:
    step(copies)
  else:
    go(lax.axis_index("warpgroup") - first_thread)


def part_of(copies: Copies, warp: int) -> Copies:
  """Returns what a warp copies: chunks and parts are assigned in turn."""

  def own[T](tasks: list[T], num_before: int) -> list[T]:
    numbered = enumerate(tasks, num_before)
    return [task for i, task in numbered if i % WARPS == warp]

  num_k, num_v = len(copies.k), len(copies.v)
  return Copies(
    own(copies.k, 0), own(copies.v, num_k), own(copies.q, num_k + num_v)
  )
