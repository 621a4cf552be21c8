"""Times two checkouts of this project in turns, in one process."""
