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

    range: how a group's grid is chosen ('minmax', 'mse', 'weighted'); act_order: 'static' takes the most active inputs
    first, 'none' takes them as they stand; damping: a share of the mean diagonal added to the Hessian's diagonal.
    """

    needs = (Hessian,)

    def __init__(self, *, range: str = "weighted", act_order: str = "static", damping: float = 0.01) -> None:
        self.range, self.act_order, self.damping = range, act_order, damping

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QuantizedWeight:
        """See `Method.quantize`."""
        return solve(
            weight,
            statistic(stats, Hessian).matrix,
            scheme,
            range_method=self.range,
            act_order=self.act_order,
            damping=self.damping,
            scale_dtype=weight.dtype,
            consume=True,
        )

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Two more [in, in] matrices, and the weight in float32 with the codes transposed."""
        rows, width = shape
        return 8 * width * width + 8 * rows * width
