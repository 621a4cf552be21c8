"""Generation from prompts, in loops that run inside jit."""

from paged_jax.generation.driver import (
  CacheConfig,
  Completion,
  generate,
  stream,
)
from paged_jax.sampling import SamplingParams

__all__ = [
  "CacheConfig",
  "Completion",
  "SamplingParams",
  "generate",
  "stream",
]
