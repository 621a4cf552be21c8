"""Generates from prompts, in steps that run inside jit."""

from paged_jax.generation.driver import Completion, generate, join, stream
from paged_jax.kv.config import CacheConfig
from paged_jax.sampling import SamplingParams

__all__ = [
  "CacheConfig",
  "Completion",
  "SamplingParams",
  "generate",
  "join",
  "stream",
]
