"""The last phase of AQLM (Egiazarian et al. 2024, arXiv:2401.06118, §3.4): codebooks tuned to a block's output."""

from __future__ import annotations

import math
from typing import Any

from llmq.block.block import Block, WeightState
from llmq.grids.base import Quantized
from llmq.grids.vq import VQWeight
from llmq.methods._training import Training, check_steps
from llmq.methods.base import Method
from llmq.numerics.tuned_vectors import TunedVectors


class Codebooks(Method):
    """Tunes the codebooks and scales of vq's weights, while their codes stay, from the output of the whole block.

    iterations: steps of Adam; minibatch: calibration windows per step, in whole batches; reach: what the rates of all
    steps sum to, as a share of a codebook's root mean square (rates fall linearly to 0); scale_reach: the same for a
    scale, as a fraction of it; last: what the last block is learned from, 'logits' (the divergence of the model's
    logits, where they follow from the block's output token by token) or 'output'.
    """

    float_target = True
    vectors = True

    def __init__(
        self,
        *,
        iterations: int = 100,
        minibatch: int = 4,
        reach: float = 0.5,
        scale_reach: float = 0.1,
        last: str = "logits",
        seed: int = 0,
    ) -> None:
        check_steps(iterations, minibatch, reach, scale_reach, last)
        self.steps: dict[str, Any] = {"iterations": iterations, "minibatch": minibatch, "seed": seed}
        self.steps |= {"reach": reach, "scale_reach": scale_reach}
        self.logits = last == "logits"

    def refine(self, block: Block) -> None:
        """See `Method.refine`.

        Keeps the iterate with the least error on held-out batches; this may be the start.
        """
        training = _Training(block, _tuned, **self.steps)
        if training.learned:
            training.run()

    def workspace(self, shape: tuple[int, ...]) -> int:
        """The rounded weight, its gradient, and a step's temporaries; codebooks and scales are small."""
        return (4 + 4 + 4) * math.prod(shape)


class _Training(Training):
    def opened(self, quantized: Quantized) -> Quantized:
        """See `Training.opened`: as it is."""
        return quantized

    def closed(self, learned: Quantized) -> Quantized:
        """See `Training.closed`: as it is."""
        return learned


def _tuned(start: Quantized, state: WeightState) -> TunedVectors:
    assert isinstance(start, VQWeight)
    return TunedVectors(start)
