"""What every method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq.capture import Statistic
from llmq.errors import LlmqError
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Scheme

Stats = Mapping[type[Statistic], Statistic]
S = TypeVar("S", bound=Statistic)


class Method:
    """A way to quantize: the three moments at which it may act; by default it does nothing, and rounds to nearest.

    needs: the statistics taken of every weight's input before `quantize`; an instance may need fewer than its class.
    """

    needs: tuple[type[Statistic], ...] = ()

    def transform(self, block: Any) -> None:
        """Changes a block's weights without changing what it computes, before anything is rounded."""

    def quantize(
        self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedWeight:
        """Rounds one weight [out, in]; the scale is stored in scale_dtype. Raises LlmqError on values that are not finite."""
        raise NotImplementedError

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Bytes that `quantize` needs for a weight of this shape, beside the weight, its codes and its statistics."""
        return 0

    def refine(self, block: Any) -> None:
        """Improves a block once all its weights are quantized."""


def statistic(stats: Stats, kind: type[S]) -> S:
    """The statistic of a kind; raises LlmqError when it was not taken."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        raise LlmqError(f"no {kind.__name__} was taken of the input of this weight")
    return found
