"""What a prompt is worth: losses of the same tokens with and without it, against the dense model, with intervals."""
