"""The sizes of a paged cache."""

import dataclasses

from jax.typing import DTypeLike

from paged_jax import dispatch
from paged_jax.kv import dtypes
from pallas_kernels.common.rounding import cdiv
from pallas_kernels.common.spec import check_count


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Sizes of a paged cache, and the implementation of ops on it.

  `generate` and `stream` choose a value for each field that is None.
  `PagedCache.init` requires all sizes.

  Attributes:
    page_size: Tokens per page; a positive multiple of 8.
    num_pages: Pages of each pool, at least 1: one number for all layer groups,
      or a tuple with one for each. None chooses as many as the batch can
      need, rounded up to a power of two, within 80 % of the free memory.
    max_len: Longest sequence in tokens, at least 1; None is the model's.
    dtype: Dtype of K and V; None is the dtype of the model. int8 and
      float8_e4m3fn are quantised and take half the memory of bfloat16.
    prefill_chunk: Prompt tokens per prefill step of `generate`, at least 1.
    implementation: Implementation of every op on the cache (attention, writes,
      page copies): `"mosaic_gpu"`, `"xla"`, or None to choose for each op.
    num_seqs: Number of rows of the batch, at least 1; None is the number of
      prompts, rounded up to a power of two.
    debug: Whether every transition of the page table is checked; see
      `page_table.assert_valid`.

  Raises:
    ValueError: If a field is out of its range.
  """

  page_size: int = 16
  num_pages: int | tuple[int, ...] | None = None
  max_len: int | None = None
  dtype: DTypeLike | None = None
  prefill_chunk: int = 512
  implementation: str | None = None
  num_seqs: int | None = None
  debug: bool = False

  def __post_init__(self):
    dispatch.check_implementation(self.implementation)
    check_count("page_size", self.page_size, 8)
    if self.page_size % 8:
      raise ValueError(f"page_size={self.page_size} must be a multiple of 8.")
    if self.dtype is not None:
      dtypes.check(self.dtype)
    if self.num_pages == ():
      raise ValueError("num_pages=() must have a number for each layer group.")
    if self.num_pages is not None:
      counts = self.num_pages
      for count in counts if isinstance(counts, tuple) else (counts,):
        check_count("num_pages", count, 1)
    check_count("prefill_chunk", self.prefill_chunk, 1)
    for name in ("max_len", "num_seqs"):
      if getattr(self, name) is not None:
        check_count(name, getattr(self, name), 1)
    if not isinstance(self.debug, bool):
      raise ValueError(f"debug={self.debug!r} must be True or False.")

  @property
  def pages_per_seq(self) -> int:
    """Number of pages of the longest sequence.

    Raises:
      ValueError: If `max_len` is None.
    """
    if self.max_len is None:
      raise ValueError("max_len=None must be an integer here.")
    return cdiv(self.max_len, self.page_size)

  def pages_of_groups(self, num_groups: int) -> tuple[int, ...]:
    """Returns the number of pages of each pool.

    Args:
      num_groups: Number of layer groups.

    Raises:
      ValueError: If `num_pages` is None, or is a tuple that does not have one
        number for each group.
    """
    if self.num_pages is None:
      raise ValueError("num_pages=None must be an integer or a tuple here.")
    if isinstance(self.num_pages, int):
      return (self.num_pages,) * num_groups
    if len(self.num_pages) != num_groups:
      raise ValueError(
        f"num_pages={self.num_pages} must be an integer, or have one for each "
        f"of the {num_groups} layer groups."
      )
    return tuple(self.num_pages)
