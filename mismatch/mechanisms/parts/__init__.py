"""What mechanisms share: one file a part. No mechanism stands here."""
