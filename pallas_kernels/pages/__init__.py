"""Writes tokens into pages, and copies pages."""
