"""Paged attention of any number of query tokens of each sequence."""
