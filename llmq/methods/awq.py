"""AWQ (Lin et al. 2023, arXiv:2306.00978): channels with large inputs are scaled up before rounding, so that they lose
less.

For each pair, s = E|x|^α per channel, with and without division by the weights' own size to the power 1 − α (§3.2,
equation 5, and the authors' code); α is found by grid search. If AWQ is also the quantizer, each group's range is then
searched by the error of the group's own output (weight clipping, `numerics.clipping`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from llmq.block.block import Block
from llmq.block.statistics import Hessian, Inputs
from llmq.errors import LlmqError
from llmq.grids.base import Quantized, rounding_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import FIXED
from llmq.methods._correction import HOW
from llmq.methods._pair_scales import Candidate, Side, balance, normalized, side
from llmq.methods.base import Method, Stats, statistic
from llmq.numerics.clipping import clip_groups
from llmq.validate import check_choice


class AWQ(Method):
    """Scales up channels with large inputs before rounding.

    alphas: number of values of α between 0 and 1 that are tried, for each of two formulas; correct: if it also
    quantizes, whether weights are corrected first for the errors of earlier ones, as gptq's are.
    """

    transform_needs = (Inputs,)
    quantize_needs = (Hessian,)

    def __init__(self, *, alphas: int = 10, correct: Literal["none", "held-out", "full"] = "none") -> None:
        if alphas < 1:
            raise LlmqError(f"alphas must be 1 or more, not {alphas!r}")
        check_choice("correct", correct, HOW)
        self.alphas, self.correct = alphas, correct

    def transform(self, block: Block) -> None:
        """See `Method.transform`."""
        for pair in block.pairs:
            found = side(block, pair)
            if found is not None:
                balance(block, pair, self._candidates(found), "awq")

    def _candidates(self, found: Side) -> Iterator[Candidate]:
        x, w = found.mean.clamp_min(1e-4), found.share.clamp_min(1e-4)
        for step in range(1, self.alphas + 1):
            alpha = step / self.alphas
            yield Candidate(f"α {alpha:g}", normalized(x**alpha))
            yield Candidate(f"α {alpha:g}, by weight", normalized(x**alpha / w ** (1 - alpha)))

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        hessian = statistic(stats, Hessian)
        moments = hessian.total / max(1, hessian.count)
        rounding = rounding_of(scheme.rules)
        scale, zero = rounding.find_scale(weight, scheme, "weighted", moments.diagonal(), scale_dtype)
        return rounding.finish(clip_groups(weight, scale, zero, scheme, moments), scale_dtype)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return FIXED
