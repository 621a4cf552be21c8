"""What the transitions of the page table cost on a GPU."""
