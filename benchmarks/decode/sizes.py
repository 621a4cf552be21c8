"""Sizes of the benchmark of decode attention, and lengths of sequences."""

import dataclasses

import numpy as np

from benchmarks.harness import batches
from benchmarks.harness.data import requests


@dataclasses.dataclass(frozen=True)
class Sizes(batches.Sizes):
  """Sizes of the cases and of their loops."""

  page_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
  same: tuple[int, int] = (64, 8192)  # sequences, tokens of each
  ragged: tuple[int, int, int] = (128, 128, 16384)  # sequences, log-uniform
  chats: int = 256  # sequences
  window: tuple[int, int, int] = (16, 131072, 4096)  # the last: visible tokens
  num_sink_tokens: int = 16
  batches: tuple[tuple[int, int], ...] = (
    (1, 8192),
    (8, 4096),
    (64, 2048),
    (64, 8192),
    (256, 1024),
    (1, 131072),
  )
  queries: tuple[int, int] = (64, 4096)
  query_lens: tuple[int, ...] = (1, 2, 4, 8)
  growing: tuple[int, int, int] = (64, 128, 8192)
  growing_steps: int = 1000
  ceiling_elements: int = 2**30  # elements of float32
  ceiling_steps: int = 100


FULL = Sizes()
SMALL = Sizes(
  **dataclasses.asdict(batches.SMALL),
  page_sizes=(8, 16),
  same=(3, 64),
  ragged=(5, 3, 70),
  chats=3,
  window=(2, 256, 32),
  num_sink_tokens=4,
  batches=((2, 128),),
  queries=(3, 40),
  query_lens=(2,),
  growing=(3, 5, 40),
  growing_steps=8,
  ceiling_elements=2**16,
  ceiling_steps=2,
)


def same(batch: tuple[int, int]) -> np.ndarray:
  """Returns the length of each sequence, from their number and length."""
  return np.full(*batch)


def log_uniform(batch: tuple[int, int, int]) -> np.ndarray:
  """Returns log-uniform lengths, from their number and the bounds."""
  num_seqs, low, high = batch
  rng = np.random.default_rng(0)
  return np.exp(rng.uniform(np.log(low), np.log(high), num_seqs)).astype(int)


def chats(num_seqs: int) -> np.ndarray:
  """Returns lengths of complete chats: prompt and answer."""
  return np.add(*requests())[:num_seqs]
