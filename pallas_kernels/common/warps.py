"""What each warp of a memory warpgroup copies.

By the warpgroup, all of its warps would carry out what one thread needs, in the
slots of those that compute, and wait for each other before each copy. So each
goes its own way through the tiles of an item, or of a piece of one, and copies
but a part:

  chunks   K 0   K 1   V 0   V 1   Q
  warp      0     1     2     3    0
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.common.gpu import WARPS


class Share(NamedTuple):
  """What of each tile, and of Q, a warp copies, or a warpgroup."""

  k: list[int]  # chunks
  v: list[int]
  q: list[Any]  # parts, whatever the caller makes of them

  @property
  def chunks(self) -> list[int]:
    """Chunks of K or of V."""
    return sorted({*self.k, *self.v})

  def pages(self, ids: list[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns the page of each chunk of K, and of V; `ids` are of `chunks`."""
    page_of = dict(zip(self.chunks, ids, strict=True))
    return {j: page_of[j] for j in self.k}, {j: page_of[j] for j in self.v}


def num_threads(interpret: plgpu.InterpretGPUParams | None) -> int:
  """Returns how many threads of a kernel the warpgroup is.

  The interpreter has one warp after the other, which would wait for ever. There
  the warpgroup copies all, or, where races are looked for, a thread stands for
  each warp, which takes longer.

  Args:
    interpret: parameters of the interpreter, None on a GPU.
  """
  return WARPS if interpret is not None and interpret.detect_races else 1


def for_each_warp(
  share: Share,
  step: Callable[[Share], None],
  *,
  first_thread: int,
  interpret: plgpu.InterpretGPUParams | None,
) -> None:
  """Calls `step(part of the share)` in each warp, for it to go its own way.

  A warp must not wait for a ring to which it copies nothing: nobody would wait
  for it, and it could miss that a tile was taken twice.

  Args:
    share: what the warpgroup copies.
    step: the function.
    first_thread: of those that the warpgroup is, see `num_threads`.
    interpret: parameters of the interpreter, None on a GPU.
  """

  def go(warp):
    for nth in range(WARPS):
      part = part_of(share, nth)
      pl.when(warp == nth)(functools.partial(step, part))

  if interpret is None:
    plgpu.warp_map(go)
  elif num_threads(interpret) == 1:
    step(share)
  else:
    go(lax.axis_index("warpgroup") - first_thread)


def part_of(share: Share, warp: int) -> Share:
  """Returns what a warp copies: all of it goes round."""

  def own[T](tasks: list[T], num_before: int) -> list[T]:
    numbered = enumerate(tasks, num_before)
    return [task for i, task in numbered if i % WARPS == warp]

  num_k, num_v = len(share.k), len(share.v)
  return Share(
    own(share.k, 0), own(share.v, num_k), own(share.q, num_k + num_v)
  )
