"""The model: configuration, checkpoints, packed linears, forward. Knows no scheduler."""
