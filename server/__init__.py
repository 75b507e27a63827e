"""HTTP over an engine and a registry. Knows no tensors."""
