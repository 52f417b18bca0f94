"""Rounding to nearest on any grid: the simplest quantizer, and the yardstick while transforms are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.float8 import find_float8_scale, round_to_float8
from llmq.grids.nf4 import quantize_nf4
from llmq.grids.ranges import find_range, round_to_grid
from llmq.grids.scheme import Scheme


def round_to_nearest(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, range: str = "mse", importance: Tensor | None = None
) -> Quantized:
    """Every weight [out, in] to the nearest point of its grid.

    range: see `numerics.ranges`; importance: float [in], for 'weighted'. A float grid takes 'minmax' and 'mse'; nf4 has
    no range to choose. Raises LlmqError on values that are not finite.
    """
    if scheme.grid == "nf4":
        return quantize_nf4(weight, scheme, scale_dtype)
    if scheme.grid == "fp8":
        scale = find_float8_scale(weight, range, scale_dtype)
        return QuantizedWeight(round_to_float8(weight, scale), scale, None, scheme)
    scale, zero = find_range(weight, scheme, range, importance, scale_dtype)
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)
