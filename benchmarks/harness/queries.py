"""Batches with many query tokens, for attention over pages."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.harness import batches
from benchmarks.harness.batches import Batch


@dataclasses.dataclass(frozen=True)
class Case:
  """A batch: the query tokens and the context of each sequence."""

  q_lens: tuple[int, ...]
  contexts: tuple[int, ...]
  page_size: int = 16
  head_dim: int = 128
  heads: tuple[int, int] = (32, 8)
  sliding_window: int | None = None
  kv_dtype: str | None = None  # dtype of quantised pages

  @property
  def flops(self) -> float:
    """FLOPs of Q K^T and P V over visible keys."""
    keys = 0
    for q_len, context in zip(self.q_lens, self.contexts, strict=True):
      seen = context + 1 + np.arange(q_len)
      keys += np.minimum(seen, self.sliding_window or seen).sum()
    return 4.0 * self.head_dim * self.heads[0] * float(keys)


def make(case: Case) -> Batch:
  """Returns the sequences and queries of a case."""
  sizes = batches.Sizes(
    num_q_heads=case.heads[0],
    num_kv_heads=case.heads[1],
    head_dim=case.head_dim,
    page_size=case.page_size,
    apart_bytes=0,
  )
  lens = np.array(case.q_lens) + np.array(case.contexts)
  starts = np.concatenate([[0], np.cumsum(case.q_lens)])
  batch = batches.make(sizes, lens)
  batch = dataclasses.replace(
    batch,
    q=batches.random_queries(sizes, int(starts[-1])),
    more=(jnp.asarray(starts, jnp.int32), jnp.int32(len(lens))),
  )
  if case.kv_dtype is None:
    return batch
  return batches.in_8_bits(batch, case.kv_dtype)
