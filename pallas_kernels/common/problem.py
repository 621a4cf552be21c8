"""The static sizes of a launch over paged KV, for decode and ragged."""

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
  """The part of a kernel's `Config` that describes KV tiles."""

  @property
  def block_kv(self) -> int:
    """Positions per KV tile."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedProblem[Config: TiledKV]:
  """The static sizes and options of a launch."""

  config: Config
  spec: AttentionSpec
  dtype: DTypeLike  # queries
  kv_dtype: DTypeLike  # pages
  num_seqs: int
  num_kv_heads: int
  group: int  # query heads per KV head
  head_dim: int
  num_pages: int
  num_layers: int
  page_size: int
  pages_per_seq: int
  interpret: plgpu.InterpretGPUParams | None

  @property
  def chunk(self) -> int:
    """Positions per chunk: one copy loads them, from a single page."""
    return math.gcd(self.page_size, self.config.block_kv)

  @property
  def num_chunks(self) -> int:
    """Chunks per KV tile."""
    return self.config.block_kv // self.chunk

  @property
  def is_quantised(self) -> bool:
    """Whether pages hold 8-bit elements, with a scale per token and KV head."""
    return limits.is_quantised(self.kv_dtype)

  def visited_tiles(self, kv_len, num_earlier, num_new=None):
    """Returns the KV tiles that queries visit; see `kv_tiles.visit`.

    Args:
      kv_len: Stored tokens of the sequence.
      num_earlier: Query tokens before the last one.
      num_new: See `kv_tiles.visit`.
    """
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
  """Returns the `PagedProblem` fields that follow from pool and page table.

  Args:
    kv: The paged keys and values.
  """
  return dict(
    num_seqs=kv.num_seqs,
    num_kv_heads=kv.num_kv_heads,
    head_dim=kv.k.shape[4],
    num_pages=kv.num_pages,
    num_layers=kv.num_layers,
    page_size=kv.page_size,
    pages_per_seq=kv.pages_per_seq,
  )
