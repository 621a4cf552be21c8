"""Counts the KV memory that pages waste and save."""
