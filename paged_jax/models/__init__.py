"""Decoder-only models and the loaders of their files."""
