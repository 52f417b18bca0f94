"""Triton kernels, one family per file, and what decides between them.

Importing a kernel imports triton; gpu, config, rule, tables and launch, and the package itself, do not.
"""
