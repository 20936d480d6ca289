"""mismatch: swap a part of a pretrained language model, see where, why and how badly it breaks."""
