"""Times writes of K and V of a step to the paged pool."""
