"""Bits to a budget: what the bits of each weight cost in loss, and the choice of bits."""
