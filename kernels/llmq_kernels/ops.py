"""The low-bit matrix products as torch operators: `torch.ops.llmq.int_linear`, `nf4_linear`, `int8_linear` ….

Importing this module registers them. Each is a folder of this package: its `operator` chooses the backend by device and
layout, and has a fake implementation for torch.compile and CUDA graphs and a gradient with respect to the input, as
training adapters on a frozen low-bit base needs; its `reference` defines it, and every backend is tested against that.
"""

from __future__ import annotations

import llmq_kernels.codebook_linear.operator  # noqa: F401
import llmq_kernels.float8_linear.operator  # noqa: F401
import llmq_kernels.grouped_int_linear.operator  # noqa: F401
import llmq_kernels.int8_linear.operator  # noqa: F401
import llmq_kernels.int_linear.operator  # noqa: F401
import llmq_kernels.levels_linear.operator  # noqa: F401
import llmq_kernels.nf4_linear.operator  # noqa: F401
import llmq_kernels.vectors_linear.operator  # noqa: F401
