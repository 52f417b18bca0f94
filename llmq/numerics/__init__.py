"""Solvers for one weight matrix, as functions on tensors; they use no model and no file."""
