"""What prefill over pages costs on a GPU."""
