"""Low-bit matrix products: torch operators, and plain functions on tensors. Depends only on torch (and triton).

`import llmq_kernels.ops` registers `torch.ops.llmq.int_linear`, `nf4_linear`, `int8_linear` and others;
`llmq_kernels.int_linear.layouts` packs a weight in the layout that `int_linear` reads on a device. Importing needs
neither a GPU nor triton.
"""

from llmq_kernels.int_linear.reference import dequantize, unpack_codes

__all__ = ["dequantize", "unpack_codes"]
