"""Times prefill of a model on a GPU."""
