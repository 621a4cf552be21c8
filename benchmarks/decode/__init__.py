"""Times decode attention on a GPU."""
