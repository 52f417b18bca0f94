"""Inputs that are rounded to 8 bits, as compressed-tensors 0.20 does: every step in x's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

INT8, FLOAT8 = 127.5, 448.0
"""What a token's largest magnitude is divided by for its scale; the second is the largest float8_e4m3fn."""


def steps(x: Tensor, input_scale: Tensor | None, divisor: float) -> Tensor:
    """The scale of inputs, in x's dtype: [..., 1], one per token of x, or input_scale [1].

    A token's is its largest magnitude / divisor, and the dtype's epsilon for a token of zeros.
    """
    if input_scale is not None:
        return input_scale.to(x.dtype)
    scale = x.detach().abs().amax(-1, keepdim=True) / divisor
    return scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)


def passing(levels: Tensor, exact: Tensor) -> Tensor:
    """The levels of exact values, both of one shape, with straight-through gradients."""
    passed = exact.nan_to_num()  # overflow is clamped; inf − inf would be NaN
    return levels + (passed - passed.detach())
