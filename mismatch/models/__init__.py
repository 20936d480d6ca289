"""Load a model, know its layout, generate from it."""
