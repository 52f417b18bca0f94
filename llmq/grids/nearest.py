"""Rounding to nearest on any grid: the simplest quantizer, and the yardstick while transforms are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import Quantized, check_range, rounding_of
from llmq.grids.scheme import Scheme


def round_to_nearest(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    range: str | None = None,
    importance: Tensor | None = None,
) -> Quantized:
    """Every weight [out, in] to the nearest point of its grid.

    range: how scales are found, one of the grid's; by default what is usual on the grid, or what is where an importance
    is given; importance: float [in], for 'weighted'. Raises LlmqError on values that are not finite, or where the grid
    has no such range.
    """
    rules = scheme.rules
    how = range or (rules.usual if importance is None else rules.calibrated)
    check_range(how, scheme, weight.shape[1])
    return rounding_of(rules).round(weight, scheme, scale_dtype, how, importance)
