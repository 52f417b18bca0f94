"""Triton kernels, one family per file. Importing a module here imports triton; importing the package does not."""
