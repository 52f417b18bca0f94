"""Triton kernels, one family per file, and the choice between them.

Importing a kernel's file imports triton; gpu, config, rule, tables, launch and the package itself do not.
"""
