"""compressed-tensors on disk: written and read."""
