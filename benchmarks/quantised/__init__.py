"""Perplexity of the demo model on quantised pages."""
