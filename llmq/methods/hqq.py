"""HQQ: no calibration data; each group's grid by half-quadratic splitting (Badri and Shaji 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.methods.base import Method, Stats
from llmq.numerics.hqq import check_options, half_quadratic
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Scheme


class HQQ(Method):
    """Half-quadratic quantization: the grid of least Σ|w − ŵ|^p, the scale then stretched to shrink less.

    p: above 0, the smaller the less outliers count; unbiased: 0…1, how far the scale goes to where Σw·ŵ = Σw²;
    iterations: of each start; beta, kappa: the penalty that holds the split-off error to the residual, and its growth.
    The defaults are what measured best: theirs, p = 0.7, clips too much once the scale is free to move.
    """

    def __init__(
        self,
        *,
        p: float = 3.0,
        unbiased: float = 0.7,
        iterations: int = 4,
        beta: float = 10.0,
        kappa: float = 1.05,
    ) -> None:
        check_options(p, beta, kappa, iterations, unbiased)
        self.options = {"p": p, "beta": beta, "kappa": kappa, "unbiased": unbiased}
        self.iterations = iterations

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> QuantizedWeight:
        """See `Method.quantize`."""
        return half_quadratic(weight, scheme, scale_dtype, iterations=self.iterations, **self.options)
