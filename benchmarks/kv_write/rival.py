"""Times FlashInfer's append to paged K and V, on the same tokens and pages."""

import time

import numpy as np

from benchmarks.harness.timing import spread_p99
from benchmarks.kv_write.batch import Batch, Sizes


def append(sizes: Sizes, batch: Batch) -> dict:
  """Times appends to every layer, captured as one CUDA graph.

  Raises:
    ImportError: If PyTorch or FlashInfer is missing.
    RuntimeError: If the pool is wrong after the appends.
  """
  import torch
  from flashinfer import page

  on_gpu = lambda x: torch.from_numpy(np.ascontiguousarray(x)).cuda()
  k, v = (
    on_gpu(np.asarray(x).view(np.int16)).view(torch.bfloat16)
    for x in (batch.k, batch.v)
  )
  shape = batch.num_pages, sizes.num_kv_heads, sizes.page_size, sizes.head_dim
  pools = [
    tuple(torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    for _ in range(sizes.num_layers)
  ]
  args = [on_gpu(x) for x in _arguments(sizes, batch)]

  def step():
    for pool in pools:
      page.append_paged_kv_cache(k, v, *args[:2], pool, *args[2:], "HND")

  step()
  slots = on_gpu(batch.slots.astype(np.int64))
  pages, offsets = slots // sizes.page_size, slots % sizes.page_size
  for pool in pools:
    for x, rows in zip(pool, (k, v), strict=True):
      if not torch.equal(x[pages, :, offsets], rows):
        raise RuntimeError("FlashInfer's pool is wrong")
  us = _timed(torch, step, sizes)
  num_bytes = 2 * (batch.k.nbytes + batch.v.nbytes)
  figures = {"us": spread_p99(us), "calls": len(us)}
  return figures | {"gb_per_s": num_bytes / figures["us"]["median"] / 1e3}


def _arguments(sizes: Sizes, batch: Batch) -> list[np.ndarray]:
  """Returns the index arrays of FlashInfer.

  They are the sequence and position of each new token, the pages of all
  sequences, their offsets, and the tokens in the last page of each sequence,
  new tokens included.
  """
  num_seqs = len(batch.tables)
  lens = np.zeros(num_seqs, np.int32)
  np.maximum.at(lens, batch.seqs, batch.positions + 1)
  used = -(-lens // sizes.page_size)
  pages = [row[:n] for row, n in zip(batch.tables, used, strict=True)]
  return [
    batch.seqs,
    batch.positions,
    np.concatenate(pages),
    np.concatenate([[0], np.cumsum(used)]).astype(np.int32),
    ((lens - 1) % sizes.page_size + 1).astype(np.int32),
  ]


def _timed(torch, step, sizes: Sizes) -> list[float]:
  """Returns the microseconds of an append, in each replay of a graph."""
  graph, steps = torch.cuda.CUDAGraph(), 16
  torch.cuda.synchronize()
  with torch.cuda.graph(graph):
    for _ in range(steps):
      step()
  us = []
  for _ in range(1 + sizes.num_loops):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    us.append(seconds / (steps * sizes.num_layers) * 1e6)
  return us[1:]  # the first replay uploads the graph
