"""Times attention of sequences that share a prefix, on a GPU."""
