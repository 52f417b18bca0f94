"""Inputs rounded to 8 bits, integers or floats, in one kernel, with a scale per token or a given one.

Every step is that of compressed-tensors, in x's own dtype, so that the codes are bit for bit those of accuracy
measurements (`llmq_kernels.inputs`). Floats are encoded by integer arithmetic: GPUs before compute capability 8.9 have
no conversion to float8_e4m3fn, and the interpreter's is another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.arithmetic import rounded, whole
from llmq_kernels.triton.gpu import gpu_of
from llmq_kernels.triton.launch import Launch, launch

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def float8(value):
    """The codes of float8_e4m3fn (4 bits of exponent, bias 7, and 3 of mantissa) nearest to float32 values in ±448.

    Half to even. Returns int32.
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ codes count steps of 2⁻⁹, of which float32 keeps whole ones beside 2¹⁴.
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def round_kernel(
    x, input_scale, codes, scale, K,
    DTYPE: tl.constexpr, EPS: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """One row of x [M, K] per program: writes codes [M, K] and their scale, float32 [M].

    input_scale: [1] or None. DTYPE: x's; EPS: its epsilon, the scale of a row of zeros; FLOAT: codes are those of
    float8_e4m3fn, as uint8, else int8.
    """
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * K
    if input_scale is None:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            most = tl.maximum(most, tl.abs(tl.load(x + at + start + k, mask=start + k < K, other=0.0).to(tl.float32)))
        # 1-element blocks, not scalars: the interpreter's scalars are numpy's, whose casts differ.
        top = tl.max(most, 0, keep_dims=True)
        step = rounded(tl.div_rn(top, 448.0 if FLOAT else 127.5), DTYPE, BACKEND).to(tl.float32)
        step = tl.where(step == 0.0, EPS, step)
    else:
        step = rounded(tl.load(input_scale + tl.arange(0, 1)).to(tl.float32), DTYPE, BACKEND).to(tl.float32)
    strange = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        value = tl.load(x + at + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        level = rounded(tl.div_rn(value, step), DTYPE, BACKEND).to(tl.float32)
        # The maximum ignores NaN, but the row's scale must be NaN.
        strange = tl.maximum(strange, (level != level).to(tl.float32))
        if FLOAT:
            level = float8(tl.minimum(tl.maximum(level, -448.0), 448.0))
        else:
            level = whole(tl.minimum(tl.maximum(level, -128.0), 127.0))
        tl.store(codes + at + start + k, level.to(codes.dtype.element_ty), mask=start + k < K)
    step = tl.where(tl.max(strange, 0, keep_dims=True) > 0.0, float("nan"), step)
    tl.store(scale + row + tl.arange(0, 1), step)


def round_input(x: Tensor, input_scale: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x rounded to 8 bits, bit for bit as the references do; a token with what is no number gets NaN as its scale.

    x: float32, bfloat16 or float16 [M, in], contiguous; input_scale: float [1], or None for one scale per token; kind:
    int8 or float8_e4m3fn. Returns the codes [M, in], of that kind, and the scales, exact in float32, [M].
    """
    codes = torch.empty(x.shape, dtype=kind, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    launch(x.device, build(x, input_scale, codes, scale, gpu_of(x.device).backend))
    return codes, scale


def build(x: Tensor, input_scale: Tensor | None, codes: Tensor, scale: Tensor, backend: str) -> Launch:
    """The launch that fills codes and scale with the result of `round_input`."""
    rows, width = x.shape
    block = min(8192, max(256, 1 << (width - 1).bit_length()))
    floats = codes.dtype == torch.float8_e4m3fn
    constexprs = {
        "DTYPE": TYPES[x.dtype],
        "EPS": torch.finfo(x.dtype).eps,
        "FLOAT": floats,
        "BLOCK": block,
        "BACKEND": backend,
    }
    options = {"num_warps": 8 if block > 2048 else 4, "enable_fp_fusion": False}
    stored = codes.view(torch.uint8) if floats else codes
    return Launch(round_kernel, (rows,), (x, input_scale, stored, scale, width), constexprs, options)
