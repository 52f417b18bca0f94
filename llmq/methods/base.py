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

    transform_needs, quantize_needs, refine_needs: the statistics taken of every weight's input before each of the
    three; which ones may depend on the options. Each is taken in a pass of the calibration windows of its own and let
    go before the next one. Of which inputs: for `transform`, those of the block as it is then; for `quantize`, those of
    the block after all transforms, unrounded; for `refine`, those of the block as quantized so far, inputs rounded
    where schemes say so: what each weight is multiplied by when the written model runs.
    float_target: for a refinement, whether its target is computed from the unquantized model's hidden states, instead
    of the quantized model's. scheme: what a quantized weight is by default with this method, as in a recipe.
    """

    transform_needs: tuple[type[Statistic], ...] = ()
    quantize_needs: tuple[type[Statistic], ...] = ()
    refine_needs: tuple[type[Statistic], ...] = ()
    float_target: bool = False
    scheme: ClassVar[dict[str, Any]] = {}

    def transform(self, block: Block) -> str | None:
        """Changes the block's weights in a way that leaves its function as it is and makes rounding cost less.

        Returns why there is nothing to do in this block, in a sentence, or None. `block.weights` have the statistics
        that `transform_needs` asks for.
        """
        raise NotImplementedError

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """Rounds one weight [out, in], in the model's dtype or float32; scales come in `scale_dtype`.

        Returns what the scheme's format stores: of the type, with tensors of the dtypes and shapes, that
        `round_to_nearest` returns for it. The plan calls it once for every scheme, on a small random weight, and
        refuses what cannot be stored. Raises LlmqError on values not finite.
        """
        raise NotImplementedError

    def refine(self, block: Block) -> str | None:
        """Replaces what the quantizer made of the block's weights by something better.

        Returns why there is nothing to do in this block, in a sentence, or None. `block.weights` have the statistics
        that `refine_needs` asks for.
        """
        raise NotImplementedError

    def grids(self) -> tuple[str, ...]:
        """The grids that `quantize` knows."""
        return ("int",)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why `quantize` cannot round to a scheme, in a clause that names it; None where it can. The plan asks."""
        grids = self.grids()
        return None if scheme.grid in grids else f"it rounds to the grid {', '.join(grids)!r}, not to {scheme}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Bytes that it needs for a weight of this shape, beside the weight and its statistics."""
        return 2 * math.prod(shape)


def range_refusal(range: str | None, scheme: Scheme) -> str | None:
    """Why scales of a scheme cannot be found in this way, or None."""
    ranges = scheme.rules.ranges
    if range is None or range in ranges:
        return None
    return f"scales of {scheme} are found by {', '.join(ranges)}, not by --range {range}"


def statistic(stats: Stats, kind: type[S]) -> S:
    """The statistic of a kind; raises LlmqError when it was not taken."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        raise LlmqError(f"no {kind.__name__} was taken of the input of this weight")
    return found
