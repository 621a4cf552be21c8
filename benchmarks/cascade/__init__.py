"""What attention of sequences that share a prefix costs on a GPU."""
