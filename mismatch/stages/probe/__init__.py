"""`mismatch probe`."""
