"""Times the transitions of the page table on a GPU."""
