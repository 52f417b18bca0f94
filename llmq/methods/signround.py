"""SignRound (Cheng et al. 2023, arXiv:2309.05516): rounding learned by sign-gradient descent on a block's output."""

from __future__ import annotations

import math

from llmq.block.block import Block, WeightState
from llmq.grids.base import QuantizedWeight
from llmq.methods._training import Training, check_steps
from llmq.methods.base import Method
from llmq.numerics.learned_rounding import LearnedWeight

# Momentum of the gradient over steps.
MOMENTUM = 0.8


class SignRound(Method):
    """Learns the rounding direction of each weight, and each scale, from the output of the whole block.

    iterations: steps of sign-gradient descent; minibatch: calibration windows per step, in whole batches; reach: how
    far all steps together can move a weight, in codes (step sizes fall linearly to 0); scale_reach: the same for a
    scale, as a fraction of it; last: what the last block is learned from, 'logits' (the divergence of the model's
    logits, where they follow from the block's output token by token) or 'output'.
    """

    float_target = True

    def __init__(
        self,
        *,
        iterations: int = 300,
        minibatch: int = 4,
        reach: float = 0.5,
        scale_reach: float = 0.5,
        last: str = "logits",
        seed: int = 0,
    ) -> None:
        check_steps(iterations, minibatch, reach, scale_reach, last)
        self.iterations, self.minibatch, self.seed = iterations, minibatch, seed
        self.reach, self.scale_reach, self.logits = reach, scale_reach, last == "logits"

    def refine(self, block: Block) -> None:
        """See `Method.refine`.

        Keeps the iterate with the least error on held-out batches; this may be the start.
        """

        def make(start: QuantizedWeight, state: WeightState) -> LearnedWeight:
            return LearnedWeight(start, state.value, MOMENTUM)

        training = Training(
            block,
            make,
            iterations=self.iterations,
            minibatch=self.minibatch,
            reach=self.reach,
            scale_reach=self.scale_reach,
            seed=self.seed,
        )
        if training.learned:
            training.run()

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Positions and momentum in float32, the rounded weight, its gradient, the best codes; a step's temporaries."""
        return (8 + 4 + 4 + 1 + 12) * math.prod(shape)
