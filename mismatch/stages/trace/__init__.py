"""`mismatch trace`."""
