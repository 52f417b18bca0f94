"""The reference of float8 weights and inputs in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.inputs import FLOAT8, passing, steps


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round an input to float8_e4m3fn as compressed-tensors 0.20 does, every step in x's own dtype.

    x: float [..., n]; input_scale: [1], or None for one scale per token: its largest magnitude / 448, and the dtype's
    epsilon for a token of zeros. Returns the levels in x's dtype, in [−448, 448], with straight-through gradients, and
    the scale in x's dtype, [..., 1] or [1].
    """
    scale = steps(x, input_scale, FLOAT8)
    exact = x / scale
    levels = exact.detach().clamp(-FLOAT8, FLOAT8).to(torch.float8_e4m3fn).to(x.dtype)
    return passing(levels, exact), scale


def float8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x · Wᵀ + bias with the input rounded to float8 too: products of codes, scaled once at the end.

    x: float [..., n]; weight: float8_e4m3fn [out, n]; scale: float [out, 1]; input_scale: as in `round_input`; bias:
    [out] or None. Returns [..., out] in x's dtype; sums are float64, and what follows is float32, rounded once.
    """
    levels, x_scale = round_input(x, input_scale)
    exact = (levels.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    y = exact * x_scale.to(torch.float32) * scale.to(torch.float32).view(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
