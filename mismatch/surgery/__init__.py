"""Swap modules of a model for mechanisms, undo it, build controls, save and load the result."""
