"""Operate, undo, controls, save, load."""
