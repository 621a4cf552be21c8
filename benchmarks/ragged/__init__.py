"""Times prefill attention over pages on a GPU."""
