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

from pallas_kernels.gpu import WARPS


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


def for_each_warp(
  share: Share, step: Callable[[Share], None], *, interpreted: bool
) -> None:
  """Calls `step(part of the share)` in each warp, for it to go its own way.

  A warp must not wait for a ring to which it copies nothing: nobody would wait
  for it, and it could miss that a tile was taken twice.

  Args:
    share: what the warpgroup copies.
    step: the function.
    interpreted: whether there is no GPU. The interpreter has one warp after the
      other, which would wait for ever: there, the warpgroup copies all.
  """
  if interpreted:
    step(share)
    return

  @plgpu.warp_map
  def _(warp):
    for nth in range(WARPS):
      part = part_of(share, nth)
      pl.when(warp == nth)(functools.partial(step, part))


def part_of(share: Share, warp: int) -> Share:
  """Returns what a warp copies: all of it goes round."""

  def own[T](tasks: list[T], num_before: int) -> list[T]:
    numbered = enumerate(tasks, num_before)
    return [task for i, task in numbered if i % WARPS == warp]

  num_k, num_v = len(share.k), len(share.v)
  return Share(
    own(share.k, 0), own(share.v, num_k), own(share.q, num_k + num_v)
  )
