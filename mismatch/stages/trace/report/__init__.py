"""Figures and words of a trace."""
