"""RTN: round every weight to nearest; only the scales are chosen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmq.block.statistics import MeanSquare
from llmq.grids.base import Quantized
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS, RANGES
from llmq.methods._correction import HOW
from llmq.methods.base import Method, Stats, range_refusal, statistic
from llmq.validate import check_choice


class RTN(Method):
    """Round to nearest; no calibration data.

    range: how scales are found: minmax, mse, percentile, kl or aciq, without data, or weighted by E[x²] of the inputs,
    by default the grid's usual one (mse, on nf4 minmax); correct: whether weights are corrected, before they are
    rounded, for the errors of earlier ones, as gptq's are; this needs calibration data.
    """

    def __init__(self, *, range: str | None = None, correct: Literal["none", "held-out", "full"] = "none") -> None:
        if range is not None:
            check_choice("range", range, RANGES)
        check_choice("correct", correct, HOW)
        self.range, self.correct = range, correct
        if range == "weighted":
            self.quantize_needs = (MeanSquare,)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        importance = statistic(stats, MeanSquare).mean if self.range == "weighted" else None
        return round_to_nearest(weight, scheme, scale_dtype, self.range, importance)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return tuple(GRIDS)

    def refusal(self, scheme: Scheme) -> str | None:
        """See `Method.refusal`."""
        return super().refusal(scheme) or range_refusal(self.range, scheme)
