"""Figures and words of a repair."""
