"""What times say: how they spread."""

import statistics

import numpy as np


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
