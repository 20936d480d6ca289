"""`mismatch train`."""
