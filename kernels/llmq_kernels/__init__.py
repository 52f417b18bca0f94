"""Low-bit matrix products as plain functions on tensors. Knows torch and nothing else of this project."""

from llmq_kernels.reference import dequantize, linear, unpack_codes

__all__ = ["dequantize", "linear", "unpack_codes"]
