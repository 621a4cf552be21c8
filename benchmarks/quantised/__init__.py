"""Measures the perplexity of the demo model on quantised pages."""
