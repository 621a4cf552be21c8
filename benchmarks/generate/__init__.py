"""Compares greedy generation of the demo model with transformers."""
