"""Times decode steps of whole models, as `stream` runs them."""
