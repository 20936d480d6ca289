"""Text: read documents, cut windows of tokens, keep the texts of different roles apart."""
