"""Times the cascade of FlashInfer, if it is installed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.batches import Batch
from benchmarks.harness.timing import spread_p99

NAMES = ["flashinfer-python", "torch"]
WORKSPACE_BYTES = 640 * 2**20
LEAST_US = 5000  # least microseconds of the calls that are timed together
NUM_REPLAYS = 11


def measure(
  case: Any, batch: Batch, check: Callable[[jax.Array], float]
) -> dict:
  """Verifies and times `MultiLevelCascadeAttentionWrapper` on a batch.

  The plans are made before and are not timed. Calls with all tables in turn
  are captured in a CUDA graph, whose replays are timed by events on the GPU.

  Args:
    case: A `Case` of the benchmark.
    batch: Sequences of the case.
    check: Maps the output with the first table to its error, and raises a
      RuntimeError if it is wrong.

  Raises:
    ImportError: If FlashInfer is not installed.
  """
  import torch

  pools = tuple(torch.from_dlpack(x) for x in (batch.k_pages, batch.v_pages))
  q = torch.from_dlpack(batch.q)
  workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
  wrappers = [
    _planned(case, np.asarray(table), workspace) for table in batch.tables
  ]
  out = wrappers[0].run(q, pools)
  error = check(jnp.from_dlpack(out.contiguous()))
  us, num_calls = _replays(
    torch, [lambda w=w: w.run(q, pools) for w in wrappers]
  )
  return {
    "us": spread_p99(us),
    "steps": num_calls,
    "calls": len(us),
    "relative_error": error,
  }


def _planned(case, table: np.ndarray, workspace):
  """Returns a wrapper that is planned for one table."""
  import flashinfer
  import torch

  ints = lambda x: torch.tensor(np.asarray(x), dtype=torch.int32, device="cuda")
  wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
  first = case.num_shared // case.page_size
  num_own = table.shape[1] - first
  last = (case.num_own - 1) % case.page_size + 1
  num_q_heads, num_kv_heads = case.heads
  wrapper.plan(
    [ints(case.groups), ints(np.arange(case.num_seqs + 1))],
    [
      ints(np.arange(case.num_groups + 1) * first),
      ints(np.arange(case.num_seqs + 1) * num_own),
    ],
    [
      ints(table[case.groups[:-1], :first].reshape(-1)),
      ints(table[:, first:].reshape(-1)),
    ],
    [
      ints(np.full(case.num_groups, case.page_size)),
      ints(np.full(case.num_seqs, last)),
    ],
    num_q_heads,
    num_kv_heads,
    128,
    case.page_size,
    q_data_type=torch.bfloat16,
    kv_data_type=torch.bfloat16,
  )
  return wrapper


def _replays(torch, calls: list[Callable]) -> tuple[list[float], int]:
  """Returns microseconds of a call in each replay, and calls of a replay."""
  begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

  def us(run) -> float:
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3

  def run_all(passes=1):
    for _ in range(passes):
      for call in calls:
        call()

  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    run_all()
  torch.cuda.current_stream().wait_stream(stream)
  torch.cuda.synchronize()
  passes = max(1, round(LEAST_US / us(run_all)))
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    run_all(passes)
  graph.replay()
  torch.cuda.synchronize()
  num_calls = passes * len(calls)
  return [us(graph.replay) / num_calls for _ in range(NUM_REPLAYS)], num_calls
