"""What every method is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from llmq.block.statistics import Statistic
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme

if TYPE_CHECKING:
    from llmq.block.block import Block

Stats = Mapping[type[Any], Any]
S = TypeVar("S")


class Method:
    """Any of three things, by which of its functions it has: a transform, a quantizer, a refinement.

    transform_needs, needs: the statistics taken of every weight's input before `transform` and before `quantize`; which
    ones may depend on the options. float_target: for a refinement, whether its target is computed from the unquantized
    model's hidden states, instead of the quantized model's. scheme: what a quantized weight is by default with this
    method, as in a recipe.
    """

    transform_needs: tuple[type[Statistic], ...] = ()
    needs: tuple[type[Statistic], ...] = ()
    float_target: bool = False
    scheme: ClassVar[dict[str, Any]] = {}

    def transform(self, block: Block) -> None:
        """Changes the block's weights in a way that leaves its function as it is and makes rounding cost less."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """Rounds one weight [out, in]; scales come in `scale_dtype`. Raises LlmqError on values not finite."""
        raise NotImplementedError

    def refine(self, block: Block) -> None:
        """Replaces what the quantizer made of the block's weights by something better."""
        raise NotImplementedError

    def grids(self) -> tuple[str, ...]:
        """The grids that `quantize` knows."""
        return ("int",)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why `quantize` cannot round to a scheme, in a sentence, or None."""
        if scheme.grid in self.grids():
            return None
        return f"rounds to the grid {', '.join(map(repr, self.grids()))}, not to {scheme}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Bytes that it needs for a weight of this shape, beside the weight and its statistics."""
        return 2 * math.prod(shape)


def range_refusal(range: str | None, scheme: Scheme) -> str | None:
    """Why scales of a scheme cannot be found in this way, or None."""
    ranges = scheme.rules.ranges
    return (
        None if range is None or range in ranges else f"finds scales by {range!r}: {scheme} knows {', '.join(ranges)}"
    )


def statistic(stats: Stats, kind: type[S]) -> S:
    """The statistic of a kind; raises LlmqError when it was not taken."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        raise LlmqError(f"no {kind.__name__} was taken of the input of this weight")
    return found
