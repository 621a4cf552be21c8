"""Tokenizers and chat templates, independent of file formats."""
