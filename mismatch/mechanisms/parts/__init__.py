"""What mechanisms share, one file each. No mechanism is defined here."""
