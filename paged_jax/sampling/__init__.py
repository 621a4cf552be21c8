"""Samples tokens inside jit, with different parameters for each row.

Every parameter is an array over the rows, so a batch may mix parameters, and
new values cause no recompilation.
"""

from paged_jax.sampling.params import (
  NO_TOKEN,
  Draws,
  Filters,
  SamplingArrays,
  SamplingParams,
  stack,
)
from paged_jax.sampling.select import has_nan, is_stop, logprobs, sample

__all__ = [
  "NO_TOKEN",
  "Draws",
  "Filters",
  "SamplingArrays",
  "SamplingParams",
  "has_nan",
  "is_stop",
  "logprobs",
  "sample",
  "stack",
]
