"""What writing K and V of a step into the paged pool costs."""
