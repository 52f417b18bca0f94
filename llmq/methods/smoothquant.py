"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers of the inputs are moved into the weights, where they lose
less.

For each pair, s = max|x|^α / max|w|^(1−α) per channel (equation 4): the input is divided by it, the weight multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from llmq.block.block import Block
from llmq.block.statistics import Inputs
from llmq.errors import LlmqError
from llmq.methods._pair_scales import Candidate, Side, balance, normalized, side
from llmq.methods.base import Method

STEPS = 10


class SmoothQuant(Method):
    """Moves outliers of the inputs into the weights; for schemes that round activations.

    alpha: migration strength, between 0 and 1, searched for each pair by default.
    """

    transform_needs = (Inputs,)
    scheme: ClassVar[dict[str, Any]] = {"bits": 8, "group_size": None, "activations": "dynamic"}

    def __init__(self, *, alpha: float | None = None) -> None:
        if alpha is not None and not 0 <= alpha <= 1:
            raise LlmqError(f"alpha must lie between 0 and 1, not {alpha!r}; leave it out to have it searched")
        self.alpha = alpha

    def transform(self, block: Block) -> None:
        """See `Method.transform`."""
        for pair in block.pairs:
            found = side(block, pair)
            if found is not None:
                balance(block, pair, self._candidates(found), "smoothquant")

    def _candidates(self, found: Side) -> Iterator[Candidate]:
        largest = found.low.abs().maximum(found.high.abs()).clamp_min(1e-5)
        alphas = [i / STEPS for i in range(STEPS + 1)] if self.alpha is None else [self.alpha]
        for alpha in alphas:
            scale = largest**alpha / found.weight.clamp_min(1e-5) ** (1 - alpha)
            yield Candidate(f"α {alpha:g}", normalized(scale))
