"""Rounding of a weight's input while the model runs (W8A8), as compressed-tensors does it.

The rounding is simulated as in compressed-tensors 0.20 (quantization/utils/helpers.py, lifecycle/forward_helpers.py),
which stock transformers runs: values are rounded to the grid and dequantized, every step in the input's own dtype. Its
int8 scale is the largest magnitude / 127.5, so the largest value rounds to 127 or, below 0, to −128; vLLM's kernels
divide by 127, in float32. Both grids have a code for 0 and no zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import rounding_of
from llmq.grids.power_scales import power_above
from llmq.grids.scheme import Scheme
from llmq.grids.table import find, inputs_of


def round_per_token(x: Tensor, grid: str) -> Tensor:
    """Round every token with its own scale: the token's largest magnitude over the grid's.

    x: any float [..., width]; grid: 'int' (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError for a grid
    without input rounding. The result equals compressed-tensors' for inputs with three axes, as in decoders; for two
    axes it would take one scale for all tokens, unlike its own servers.
    """
    scale = x.abs().amax(-1, keepdim=True) / inputs_of(grid).divisor
    return round_static(x, scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps), grid)


def round_static(x: Tensor, scale: Tensor, grid: str) -> Tensor:
    """Round values with a given scale; values beyond the grid's ends are clipped.

    x: any float [..., width]; scale: any positive float that broadcasts to x, converted to x's dtype first; grid: 'int'
    (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError for a grid without input rounding.
    """
    limits = inputs_of(grid)
    scale = scale.to(x.dtype)
    levels = rounding_of(find(grid)).round_input((x / scale).clamp_(limits.low, limits.high))
    return levels.mul_(scale)


def round_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """A weight's input [..., in] rounded as its scheme says: per token, or with `scale` if given."""
    if scheme.activations is None:
        return x
    if scale is None:
        return round_per_token(x, scheme.grid)
    return round_static(x, stored_scale(scale, scheme).to(x.device), scheme.grid)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """A static scale, float32, as it is stored beside a weight: the next power of two, if the scheme wants those."""
    return scale if scheme.scales == "free" else power_above(scale)


def static_scale(largest: Tensor | float, grid: str) -> Tensor:
    """The scale at which `largest` is the grid's largest magnitude, float32 [1]; 1 if `largest` is 0."""
    top = torch.as_tensor(largest, dtype=torch.float32).reshape(1)
    return torch.where(top > 0, top / inputs_of(grid).divisor, 1.0)
