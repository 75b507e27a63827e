"""What the lab learns and measures on: documents, windows of token ids, and splits that share nothing."""
