"""Modules that the benchmarks share: timing, batches, results."""
