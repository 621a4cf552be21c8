"""How tokens are chosen, row by row, inside jit.

Every option is an array over the rows, so that a batch may mix them and no
value compiles anything anew.
"""

from paged_jax.sampling.params import (
  NO_TOKEN,
  Draws,
  Filters,
  SamplingArrays,
  SamplingParams,
  stack,
)
from paged_jax.sampling.select import is_stop, logprobs, sample

__all__ = [
  "NO_TOKEN",
  "Draws",
  "Filters",
  "SamplingArrays",
  "SamplingParams",
  "is_stop",
  "logprobs",
  "sample",
  "stack",
]
