"""A decoder block while it is quantized: what methods see."""
