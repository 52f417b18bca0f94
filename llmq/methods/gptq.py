"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): the arithmetic is in `llmq.numerics.gptq`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmq.block.statistics import Hessian
from llmq.errors import LlmqError
from llmq.grids.base import Quantized, rounding_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import EACH, RANGES
from llmq.methods._correction import HOW
from llmq.methods.base import Method, Stats, range_refusal, statistic
from llmq.numerics.gptq import solve
from llmq.validate import check_choice

DAMPING, PLAIN_DAMPING = 0.05, 0.01


class GPTQ(Method):
    """Rounds column by column; later columns compensate for the error of earlier ones, by the Hessian of the inputs.

    range: how scales are found: minmax, mse, percentile, kl, aciq, or weighted by the cost of each column's rounding;
    act_order: static takes the most active inputs first, grouped the most active groups, none keeps the order of the
    inputs; damping: fraction of the Hessian's mean diagonal that is added to its diagonal, by default 0.05, without
    corrections 0.01; sweeps: how often scales and codes are improved after the first pass; correct: whether a block's
    weights are quantized in their order of use, each corrected for the errors of all before it: held-out chooses how
    strongly on tokens kept for that, full does it entirely, none takes less than half of the time (none with 0 sweeps
    is the paper's GPTQ).
    """

    quantize_needs = (Hessian,)

    def __init__(
        self,
        *,
        range: str = "weighted",
        act_order: Literal["grouped", "static", "none"] = "grouped",
        damping: float | None = None,
        sweeps: int = 2,
        correct: Literal["held-out", "full", "none"] = "held-out",
    ) -> None:
        check_choice("range", range, RANGES)
        check_choice("correct", correct, HOW)
        if sweeps < 0:
            raise LlmqError(f"sweeps must be 0 or more, not {sweeps!r}")
        if damping is None:
            damping = PLAIN_DAMPING if correct == "none" else DAMPING
        if not 0 < damping < 1:
            raise LlmqError(f"damping must lie between 0 and 1, not {damping!r}")
        self.range, self.act_order, self.damping, self.sweeps = range, act_order, damping, sweeps
        self.correct = correct

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        solved = solve(
            weight,
            statistic(stats, Hessian).total,
            scheme,
            range_method=self.range,
            act_order=self.act_order,
            damping=self.damping,
            sweeps=self.sweeps,
            scale_dtype=scale_dtype,
        )
        return rounding_of(scheme.rules).finish(solved, scale_dtype)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return EACH

    def refusal(self, scheme: Scheme) -> str | None:
        """See `Method.refusal`."""
        return super().refusal(scheme) or range_refusal(self.range, scheme)

    def apart(self, scheme: Scheme) -> bool:
        """See `Method.apart`."""
        return rounding_of(scheme.rules).apart

    def workspace(self, shape: tuple[int, ...]) -> int:
        """One more [in, in] matrix and one of the weight's size, then four of that, all float32; and codes."""
        rows, width = shape
        return max(4 * width * width + 5 * rows * width, self._swept(shape))

    def together(self, shape: tuple[int, ...], statistics: int) -> int:
        """See `Method.together`: the Hessian rests while its factor is used."""
        rows, width = shape
        return max(statistics, 4 * width * width + 5 * rows * width, statistics + self._swept(shape))

    def _swept(self, shape: tuple[int, ...]) -> int:
        """What sweeps take."""
        rows, width = shape
        return 18 * rows * width if self.sweeps else 0
