"""Times of calls, and their spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def call_us(
  call: Callable[[], Any], num_calls: int, num_steps: int = 1
) -> list[float]:
  """Returns the microseconds of a step in each call, measured on the host.

  Args:
    call: Returns the arrays to wait for.
    num_calls: Number of calls to time.
    num_steps: Number of steps in a call.
  """
  us = []
  for _ in range(num_calls):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    us.append((time.perf_counter() - begin) / num_steps * 1e6)
  return us


def spread(values: list[float]) -> dict[str, float]:
  """Returns minimum, median and maximum."""
  return {
    "min": min(values),
    "median": statistics.median(values),
    "max": max(values),
  }


def spread_p99(values: list[float]) -> dict[str, float]:
  """Returns minimum, median, maximum and 99th percentile."""
  return {**spread(values), "p99": float(np.percentile(values, 99))}
