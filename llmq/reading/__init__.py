"""Weights as other tools store them → the plain form that llmq's kernels are packed from: one file per format."""
