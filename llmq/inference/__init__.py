"""Packed weights at work: linear layers, loading, generation."""
