"""The paired, streaming trace: which values are taken, how they are captured, and in which order they come."""
