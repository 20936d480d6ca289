"""Read text, cut it into windows, keep texts apart."""
