"""Reads model files."""
