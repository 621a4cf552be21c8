"""Benchmarks, a folder each, and the modules that they share."""
