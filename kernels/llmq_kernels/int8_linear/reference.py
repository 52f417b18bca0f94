"""The reference of 8-bit weights and inputs in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.inputs import INT8, passing, steps


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round an input to signed 8 bits as compressed-tensors 0.20 does, every step in x's own dtype.

    x: float [..., n]; input_scale: [1], or None for one scale per token: its largest magnitude / 127.5, and the dtype's
    epsilon for a token of zeros. Returns the levels, integers in [−128, 127] in x's dtype, with straight-through
    gradients, and the scale in x's dtype, [..., 1] or [1].
    """
    scale = steps(x, input_scale, INT8)
    exact = x / scale
    return passing(exact.detach().clamp(-128, 127).round(), exact), scale


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x · Wᵀ + bias with the input rounded to 8 bits too: integer products, scaled once at the end.

    x: float [..., n]; weight: int8 [out, n]; scale: float [out, 1]; input_scale: as in `round_input`; bias: [out] or
    None. Returns [..., out] in x's dtype, rounded once from float32.
    """
    levels, x_scale = round_input(x, input_scale)
    # Float64 sums integers exactly, as int32 does.
    exact = (levels.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    y = exact * x_scale.to(torch.float32) * scale.to(torch.float32).view(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
