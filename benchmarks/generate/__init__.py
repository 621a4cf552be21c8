"""Greedy generation on the demo model beside transformers."""
