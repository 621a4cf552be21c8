"""What decode attention costs on a GPU."""
