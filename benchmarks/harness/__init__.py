"""What the benchmarks share: timing, batches, results."""
