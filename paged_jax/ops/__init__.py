"""The public attention ops."""
