"""What a command does: one folder a stage, one contract, one runner."""
