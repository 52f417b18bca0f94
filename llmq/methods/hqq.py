"""HQQ: no calibration data; each group's grid by half-quadratic splitting (Badri and Shaji 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmq.grids.base import Quantized, rounding_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import FIXED, GRIDS
from llmq.methods._correction import HOW
from llmq.methods.base import Method, Stats
from llmq.numerics.hqq import check_options, half_quadratic
from llmq.validate import check_choice


class HQQ(Method):
    """Half-quadratic quantization: the grid of least Σ|w − ŵ|^p, with a slightly larger scale; no calibration data.

    p: exponent of the errors, above 0, in the paper 0.7 (which clips too much when the scale is optimized too);
    unbiased: 0 to 1, how far the scale moves towards the one at which rounding does not shrink the weights, Σw·ŵ = Σw²;
    correct: whether weights are corrected, before they are rounded, for the errors of earlier ones, as gptq's are; this
    needs calibration data.
    """

    def __init__(
        self, *, p: float = 3.0, unbiased: float = 0.7, correct: Literal["none", "held-out", "full"] = "none"
    ) -> None:
        check_options(p, unbiased=unbiased)
        check_choice("correct", correct, HOW)
        self.p, self.unbiased, self.correct = p, unbiased, correct

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        found = half_quadratic(weight, scheme, scale_dtype, p=self.p, unbiased=self.unbiased)
        return rounding_of(scheme.rules).finish(found, scale_dtype)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return tuple(name for name in FIXED if not GRIDS[name].span)
