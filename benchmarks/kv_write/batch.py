"""Tokens of a step, and their slots in random pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.rounding import cdiv


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases and of their loops."""

  implementation: str | None = "mosaic_gpu"
  # Sequences, and new tokens of each: 64, 512 and 8,192 in all.
  batches: tuple[tuple[int, int], ...] = ((64, 1), (8, 64), (8, 1024))
  dtypes: tuple[str, ...] = ("bfloat16", "int8", "float8_e4m3fn")
  num_layers: int = 16  # written in order, in each step of a loop
  num_kv_heads: int = 8
  head_dim: int = 128
  page_size: int = 16
  spare_pages: int = 512  # pages without writes
  pieces: tuple[int, ...] = (1, 2, 3, 4, 6, 8)  # pieces per thread
  loop_us: float = 50_000  # about; the host sees the end of a loop 1 ms late
  num_loops: int = 10


FULL = Sizes()
SMALL = Sizes(
  implementation=None,
  batches=((5, 1), (2, 11)),
  dtypes=("bfloat16", "int8"),
  num_layers=2,
  num_kv_heads=2,
  head_dim=16,
  page_size=8,
  spare_pages=3,
  pieces=(),
  loop_us=20,
  num_loops=2,
)


@dataclasses.dataclass(frozen=True)
class Batch:
  """New tokens of some sequences, which begin anywhere in a page."""

  seqs: np.ndarray  # i32[num_tokens]
  positions: np.ndarray  # i32[num_tokens], in the pages of the sequence
  tables: np.ndarray  # i32[num_seqs, pages_per_seq], no page twice
  slots: np.ndarray  # i32[num_tokens]
  num_pages: int
  k: jax.Array  # bf16[num_tokens, num_kv_heads, head_dim]
  v: jax.Array  # bf16[num_tokens, num_kv_heads, head_dim]


def make(sizes: Sizes, num_seqs: int, num_new: int) -> Batch:
  """Returns a batch; the same sizes give the same batch."""
  rng, page_size = np.random.default_rng(0), sizes.page_size
  starts = rng.integers(page_size, size=num_seqs)
  pages_per_seq = cdiv(page_size - 1 + num_new, page_size)
  num_pages = num_seqs * pages_per_seq + sizes.spare_pages
  order = rng.permutation(num_pages).astype(np.int32)
  tables = order[: num_seqs * pages_per_seq].reshape(num_seqs, pages_per_seq)
  seqs = np.repeat(np.arange(num_seqs), num_new)
  positions = starts[seqs] + np.tile(np.arange(num_new), num_seqs)
  pages = tables[seqs, positions // page_size]
  shape = num_seqs * num_new, sizes.num_kv_heads, sizes.head_dim
  k, v = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key in jax.random.split(jax.random.key(0))
  )
  return Batch(
    seqs=seqs.astype(np.int32),
    positions=positions.astype(np.int32),
    tables=tables,
    slots=(pages * page_size + positions % page_size).astype(np.int32),
    num_pages=num_pages,
    k=k,
    v=v,
  )
