"""Compression of a dense checkpoint, layer by layer: quantised, pruned, or both in one pass."""
