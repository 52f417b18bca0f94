"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): the arithmetic is in `llmq.numerics.gptq`."""

from __future__ import annotations

from torch import Tensor

from llmq.capture import Hessian
from llmq.methods.base import Method, Stats, statistic
from llmq.numerics.gptq import solve
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Scheme


class GPTQ(Method):
    """Rounds column by column; later columns make up for earlier ones, as the inputs' second moments allow.

    range: how a group's grid is chosen ('minmax', 'mse', 'weighted'); act_order: 'static' takes the most active
    inputs first, 'grouped' the most active groups, 'none' takes inputs as they stand; damping: a share of the mean
    diagonal added to the Hessian's diagonal; sweeps: how often scales and codes are revisited once all are there (0 is
    the paper's GPTQ).
    """

    needs = (Hessian,)

    def __init__(
        self, *, range: str = "weighted", act_order: str = "grouped", damping: float = 0.01, sweeps: int = 2
    ) -> None:
        self.range, self.act_order, self.damping, self.sweeps = range, act_order, damping, sweeps

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QuantizedWeight:
        """See `Method.quantize`."""
        return solve(
            weight,
            statistic(stats, Hessian).total,
            scheme,
            range_method=self.range,
            act_order=self.act_order,
            damping=self.damping,
            sweeps=self.sweeps,
            scale_dtype=weight.dtype,
        )

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Two more [in, in] matrices while factoring, then four of the weight's size, all float32."""
        rows, width = shape
        return max(8 * width * width + 4 * rows * width, 4 * width * width + 16 * rows * width)
