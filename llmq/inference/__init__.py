"""Inference with packed weights: linear layers, loading, generation."""
