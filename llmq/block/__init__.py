"""A decoder block while it is quantized, as methods see it."""
