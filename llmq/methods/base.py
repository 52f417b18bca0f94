"""What every method is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from llmq.capture import Statistic
from llmq.errors import LlmqError
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Scheme

Stats = Mapping[type[Any], Any]
S = TypeVar("S")


class Method:
    """A way to quantize one weight.

    needs: the statistics taken of every weight's input before `quantize`; which ones may depend on the options.
    """

    needs: tuple[type[Statistic], ...] = ()

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QuantizedWeight:
        """Rounds one weight [out, in]; the scale is in the weight's dtype. Raises LlmqError on values not finite."""
        raise NotImplementedError

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Bytes that `quantize` needs for a weight of this shape, beside the weight and its statistics."""
        return 2 * math.prod(shape)


def statistic(stats: Stats, kind: type[S]) -> S:
    """The statistic of a kind; raises LlmqError when it was not taken."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        raise LlmqError(f"no {kind.__name__} was taken of the input of this weight")
    return found
