"""What metrics share: accumulators that update, merge and compute."""
