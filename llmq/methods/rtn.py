"""RTN: every weight to the nearest point of its grid. What it can choose is the grid."""

from __future__ import annotations

from torch import Tensor

from llmq.capture import MeanSquare
from llmq.methods.base import Method, Stats, statistic
from llmq.numerics.quantized import QuantizedWeight
from llmq.numerics.ranges import find_range, round_to_grid
from llmq.recipe import Scheme


class RTN(Method):
    """Round to nearest.

    range: 'minmax' and 'mse' need no data; 'weighted' weighs each column's error by the mean square of its input.
    """

    def __init__(self, *, range: str = "mse") -> None:
        self.range = range
        if range == "weighted":
            self.needs = (MeanSquare,)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QuantizedWeight:
        """See `Method.quantize`."""
        importance = statistic(stats, MeanSquare).mean if self.range == "weighted" else None
        scale, zero = find_range(weight, scheme, self.range, importance, weight.dtype)
        return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)
