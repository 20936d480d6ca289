"""The demo models and texts: fetched, pinned by hash, converted."""
