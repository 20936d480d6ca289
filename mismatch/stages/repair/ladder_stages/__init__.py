"""The stages of the repair ladder and what they share."""
