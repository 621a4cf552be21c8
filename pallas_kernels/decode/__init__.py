"""Paged decode attention: few query tokens of each sequence."""
