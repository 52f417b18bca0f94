"""The sum, in a fixed order, of partial results of programs that share K."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.arithmetic import follow, rounded
from llmq_kernels.triton.launch import Launch

BLOCK = 512


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    parts, bias, y, M, N, PROGRAMS_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, BACKEND: tl.constexpr
):
    """y [M, N] = Σ parts [PROGRAMS_K, M, N] + bias, in float32, rounded once."""
    follow(PDL)
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PROGRAMS_K):
        total += tl.load(parts + (part * M + m) * N + n, mask=n < N, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, rounded(total, y.dtype.element_ty, BACKEND), mask=n < N)


def build(parts: Tensor, bias: Tensor | None, y: Tensor, pdl: bool, backend: str) -> Launch:
    """The launch that fills y [M, N] with the sum of parts float32 [PROGRAMS_K, M, N], + bias [N]; pdl: see Config."""
    programs_k, m, n = parts.shape
    constexprs = {"PROGRAMS_K": programs_k, "BLOCK": BLOCK, "PDL": pdl, "BACKEND": backend}
    options = {"num_warps": 4, "enable_fp_fusion": True} | ({"launch_pdl": True} if pdl else {})
    return Launch(sum_kernel, (-(-n // BLOCK), m), (parts, bias, y, m, n), constexprs, options)
