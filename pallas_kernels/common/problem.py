"""The static facts of a launch over paged KV, which both kernels share."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.common import kv_tiles, limits
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionSpec


@runtime_checkable
class TiledKV(Protocol):
  """A `Config` of a kernel, as far as KV tiles go."""

  @property
  def block_kv(self) -> int:
    """Positions of a KV tile."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedProblem[Config: TiledKV]:
  """The static facts of a launch."""

  config: Config
  spec: AttentionSpec
  dtype: DTypeLike  # of the queries
  kv_dtype: DTypeLike  # of the pages
  num_seqs: int
  num_kv_heads: int
  group: int  # query heads of a KV head
  head_dim: int
  num_pages: int
  num_layers: int
  page_size: int
  pages_per_seq: int
  interpret: plgpu.InterpretGPUParams | None

  @property
  def chunk(self) -> int:
    """Positions of a tile that one copy brings: they are of one page."""
    return math.gcd(self.page_size, self.config.block_kv)

  @property
  def num_chunks(self) -> int:
    """Copies of a tile."""
    return self.config.block_kv // self.chunk

  @property
  def is_quantised(self) -> bool:
    """Whether pages hold 8-bit numbers, with a scale for each token."""
    return limits.is_quantised(self.kv_dtype)

  def visited_tiles(self, kv_len, num_earlier, num_new=None):
    """Returns the KV tiles that queries visit; see `kv_tiles.visit`."""
    return kv_tiles.visit(
      kv_len,
      num_earlier,
      num_new,
      capacity=self.pages_per_seq * self.page_size,
      block_kv=self.config.block_kv,
      sliding_window=self.spec.sliding_window,
      num_sink_tokens=self.spec.num_sink_tokens,
    )


def sizes_of(kv: PagedKV) -> dict[str, int]:
  """Returns the fields of a `PagedProblem` that the pool and table tell."""
  return dict(
    num_seqs=kv.num_seqs,
    num_kv_heads=kv.num_kv_heads,
    head_dim=kv.k.shape[4],
    num_pages=kv.num_pages,
    num_layers=kv.num_layers,
    page_size=kv.page_size,
    pages_per_seq=kv.pages_per_seq,
  )
