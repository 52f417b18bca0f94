"""Rounding of a weight's input while the model runs, as compressed-tensors does it: what W8A8 costs in accuracy.

Simulated, as in compressed-tensors 0.20 (quantization/utils/helpers.py, lifecycle/forward_helpers.py), which is what
stock transformers runs: values are rounded to the grid and multiplied back, and every step is in the input's own dtype.
Its int8 scale is the largest magnitude / 127.5, so the largest value rounds to 127 or, below 0, to −128; vLLM's kernels
divide by 127, in float32. Both grids have a code for 0 and no zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import rounding_of
from llmq.grids.table import find, inputs_of


def round_per_token(x: Tensor, grid: str) -> Tensor:
    """Every token's values on a grid of its own: the scale is the token's largest magnitude over the grid's.

    x: any float [..., width]; grid: 'int' (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError at a grid
    that leaves inputs alone. compressed-tensors agrees for inputs of three axes, which decoders have; given two it
    takes one scale for all of them, and so would differ from its own servers.
    """
    scale = x.abs().amax(-1, keepdim=True) / inputs_of(grid).divisor
    return round_static(x, scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps), grid)


def round_static(x: Tensor, scale: Tensor, grid: str) -> Tensor:
    """Values on a grid known beforehand; what lies beyond its ends is clipped.

    x: any float [..., width]; scale: any float that broadcasts to x, positive, turned into x's dtype first;
    grid: 'int' (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError at a grid that leaves inputs alone.
    """
    limits = inputs_of(grid)
    scale = scale.to(x.dtype)
    levels = rounding_of(find(grid)).round_input((x / scale).clamp_(limits.low, limits.high))
    return levels.mul_(scale)


def static_scale(largest: Tensor | float, grid: str) -> Tensor:
    """The scale of a grid whose end is the largest magnitude an input is to keep, float32 [1]; 1 where that is 0."""
    top = torch.as_tensor(largest, dtype=torch.float32).reshape(1)
    return torch.where(top > 0, top / inputs_of(grid).divisor, 1.0)
