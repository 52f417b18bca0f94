"""Rounding to nearest on any grid: the simplest quantizer, also used to judge candidate transforms."""

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
    """Round a weight [out, in] to nearest on its grid.

    range: one of the grid's range methods; the default is the grid's usual one, or its calibrated one if an importance
    is given; importance: float [in], for 'weighted'. Raises LlmqError if a value is not finite, or the grid does not
    have this range method.
    """
    rules = scheme.rules
    how = range or (rules.usual if importance is None else rules.calibrated)
    check_range(how, scheme, weight.shape[1])
    return rounding_of(rules).round(weight, scheme, scale_dtype, how, importance)
