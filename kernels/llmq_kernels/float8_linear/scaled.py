"""`llmq::float8_linear` by torch's own product of float8 matrices, `torch._scaled_mm`, after one kernel that rounds x.

What `_scaled_mm` takes depends on the GPU, torch and CUDA: a scale per row and column, with results in bfloat16; or one
for all, with float32 sums that are scaled afterwards. Both are tried once per device, on a small product; where neither
is right, the dequantized weight is multiplied.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from llmq_kernels.float8_linear import dense
from llmq_kernels.weights import PackedFloat8

MULTIPLE = 16
"""Of inputs and outputs, which torch's product asks for."""
Way = Literal["rows", "whole"]


def linear(x: Tensor, weight: PackedFloat8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded as in `reference.round_input`.

    x: bfloat16 or float16 [M, in], contiguous; bias: float [out]. Returns [M, out] in x's dtype, rounded once.
    """
    way = way_of(x.device, x.dtype, weight.out_features, weight.in_features)
    if way is None:
        return dense.linear(x, weight, bias)
    from llmq_kernels.triton.inputs import round_input

    codes, x_scale = round_input(x, weight.input_scale, torch.float8_e4m3fn)
    return multiply(codes, x_scale, weight, bias, x.dtype, way)


def multiply(
    codes: Tensor, x_scale: Tensor, weight: PackedFloat8, bias: Tensor | None, dtype: torch.dtype, way: Way
) -> Tensor:
    """The product of rounded inputs: codes float8_e4m3fn [M, in], x_scale float32 [M]. Returns [M, out] in `dtype`."""
    scale, turned = weight.scale.to(torch.float32), weight.packed.t()
    if way == "rows":
        bias = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(codes, turned, x_scale.unsqueeze(1), scale.view(1, -1), bias=bias, out_dtype=dtype)
    one = torch.ones((), device=codes.device)
    sums = torch._scaled_mm(codes, turned, one, one, out_dtype=torch.float32)
    sums.mul_(x_scale.unsqueeze(1)).mul_(scale.view(1, -1))
    return (sums if bias is None else sums.add_(bias)).to(dtype)


def way_of(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> Way | None:
    """How `_scaled_mm` multiplies matrices of these sizes on a device, or None."""
    return None if out_features % MULTIPLE or in_features % MULTIPLE else _way(device, dtype)


def refusal(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    """Why dequantized weights are multiplied on a GPU, or None if `_scaled_mm` multiplies codes."""
    if out_features % MULTIPLE or in_features % MULTIPLE:
        return f"torch multiplies float8 matrices whose sizes are multiples of {MULTIPLE}"
    return None if _way(device, dtype) else "torch multiplies no float8_e4m3fn matrices on this GPU"


@functools.cache
def _way(device: torch.device, dtype: torch.dtype) -> Way | None:
    """What works on a device, first what takes one kernel; a CPU's product is slower than `dense`, and is no way."""
    if device.type == "cpu":
        return None
    return next((way for way in ("rows", "whole") if works(device, dtype, way)), None)


def works(device: torch.device, dtype: torch.dtype, way: Way) -> bool:
    """Whether products, whose results are known exactly, are right: of one row, of any number, and with a bias."""
    packed = torch.full((32, 64), 0.5, device=device).to(torch.float8_e4m3fn)
    x_scale, scale = (torch.exp2(torch.arange(32, device=device) % 4 - first) for first in (1.0, 2.0))
    weight = PackedFloat8(packed, scale.unsqueeze(1), None)
    for rows, bias in ((32, None), (1, None), (17, torch.full((32,), 8.0, device=device, dtype=dtype))):
        codes = torch.full((rows, 64), 2.0, device=device).to(torch.float8_e4m3fn)
        try:
            found = multiply(codes, x_scale[:rows], weight, bias, dtype, way)
        except (RuntimeError, ValueError, TypeError):  # NotImplementedError, too: each torch and GPU has its own
            return False
        wanted = 64 * x_scale[:rows].unsqueeze(1) * scale
        if not torch.equal(found.float(), wanted if bias is None else wanted + 8):
            return False
    return True
