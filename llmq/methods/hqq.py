"""HQQ: no calibration data; each group's grid by half-quadratic splitting (Badri and Shaji 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import Quantized, rounding_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS
from llmq.methods.base import Method, Stats
from llmq.numerics.hqq import check_options, half_quadratic


class HQQ(Method):
    """Half-quadratic quantization: the grid of least Σ|w − ŵ|^p, with a slightly larger scale; no calibration data.

    p: exponent of the errors, above 0, in the paper 0.7 (which clips too much when the scale is optimized too);
    unbiased: 0 to 1, how far the scale moves towards the one at which rounding does not shrink the weights, Σw·ŵ = Σw².
    """

    def __init__(self, *, p: float = 3.0, unbiased: float = 0.7) -> None:
        check_options(p, unbiased=unbiased)
        self.p, self.unbiased = p, unbiased

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        found = half_quadratic(weight, scheme, scale_dtype, p=self.p, unbiased=self.unbiased)
        return rounding_of(scheme.rules).finish(found, scale_dtype)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return tuple(GRIDS)
