"""Quantization-aware training of one block at a time: weights and step sizes, through the rounding.

Block-AP of EfficientQAT (Chen et al. 2024, arXiv:2407.11062, §3.2) with the step gradients of LSQ (Esser et al. 2019,
arXiv:1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.methods._training import Training, check_steps
from llmq.methods.base import Method
from llmq.numerics.straight_through import Adam, TrainedWeight

ESTIMATORS = ("ste", "dsq", "saq", "mix")
# How far a sharpness-aware step looks, as a share of the norm of the weights (Foret et al. 2020: 0.05 of a network's).
RADIUS = 0.01
# The share of the float weight at the start of 'mix', which falls linearly to 0 at half of all steps.
FLOAT_SHARE = 0.5


class BlockQat(Method):
    """Trains the weights and step sizes of a block straight through their rounding, from the output of the whole block.

    iterations: steps of Adam; minibatch: calibration windows per step, in whole batches; reach: what the rates of all
    steps sum to, in steps of the grid (rates fall linearly to 0); scale_reach: the same for a scale, as a fraction of
    it; estimator: of the rounding's gradient: 'ste' (straight through: LSQ), 'dsq' (of a soft rounding: Gong et al.
    2019, arXiv:1908.05033), 'saq' (straight through, where the loss is highest nearby: Liu et al. 2021,
    arXiv:2111.12273; two passes a step) or 'mix' (straight through, of a mean of float and rounded weights, which ends
    at the rounded ones); clip_reach: as scale_reach, for static scales of inputs (PACT: Choi et al. 2018,
    arXiv:1805.06085; dynamic scales are each token's largest magnitude, and have nothing to learn); last: what the last
    block is learned from, 'logits' (the divergence of the model's logits, where they follow from the block's output
    token by token) or 'output'.
    """

    float_target = True

    def __init__(
        self,
        *,
        iterations: int = 300,
        minibatch: int = 4,
        reach: float = 3.0,
        scale_reach: float = 0.5,
        estimator: str = "ste",
        clip_reach: float = 0.1,
        last: str = "logits",
        seed: int = 0,
    ) -> None:
        check_steps(iterations, minibatch, reach, scale_reach, last)
        if estimator not in ESTIMATORS:
            raise LlmqError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
        if not 0 <= clip_reach < 1:
            raise LlmqError(f"clip-reach must lie between 0 and 1, not {clip_reach!r}")
        self.estimator, self.clip_reach, self.logits = estimator, clip_reach, last == "logits"
        self.steps: dict[str, Any] = {"iterations": iterations, "minibatch": minibatch, "seed": seed}
        self.steps |= {"reach": reach, "scale_reach": scale_reach}

    def refine(self, block: Block) -> None:
        """See `Method.refine`.

        Keeps the iterate with the least error on held-out batches; this may be the start.
        """
        training = _Training(self, block)
        if training.learned:
            training.run()

    def workspace(self, shape: tuple[int, ...]) -> int:
        """The weight and its two moments in float32, the rounded weight, its gradient, the best codes; a step's
        temporaries."""
        return (12 + 4 + 4 + 1 + 28) * math.prod(shape)


class _Training(Training):
    """Training of one block. clips: the scale of each rounded input that is learned, by `input_id`, with its start."""

    def __init__(self, method: BlockQat, block: Block) -> None:
        def make(start: QuantizedWeight, state: WeightState) -> TrainedWeight:
            return TrainedWeight(start, state.value, "dsq" if method.estimator == "dsq" else "ste")

        super().__init__(block, make, **method.steps)
        self.method, self.left = method, 1.0
        self.clips: dict[int, tuple[Tensor, Tensor, Adam]] = {}
        self.best_clips: dict[int, Tensor] = {}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """See `Training.learning`; static scales of inputs have gradients too, one for all weights of an input."""
        states = [state for state in self.block.weights.values() if state.input_scale is not None]
        if self.method.clip_reach:
            for state in states:
                start = state.input_scale
                assert start is not None
                if state.input_id not in self.clips:
                    self.clips[state.input_id] = start.clone().requires_grad_(True), start, Adam(start)
                state.input_scale = self.clips[state.input_id][0]
        self.best_clips = {number: start for number, (_, start, _) in self.clips.items()}
        try:
            with super().learning():
                yield
        finally:
            for state in states:
                if state.input_id in self.best_clips:
                    self.block.set_input_scale(state.parameter, self.best_clips[state.input_id])

    def found(self) -> list[Quantized]:
        """See `Training.found`."""
        self.best_clips = {number: clip.detach().clone() for number, (clip, _, _) in self.clips.items()}
        return super().found()

    def leaves(self) -> list[Tensor]:
        """See `Training.leaves`."""
        return [*super().leaves(), *(clip for clip, _, _ in self.clips.values())]

    def descend(self, batches: list[int], share: float) -> None:
        """See `Training.descend`."""
        if self.method.estimator == "mix":
            self.left -= 2 / self.iterations
            self._write(max(0.0, self.left) * FLOAT_SHARE)
        if self.method.estimator == "saq":
            self._climb(batches)
        super().descend(batches, share)
        for clip, start, moments in self.clips.values():
            if clip.grad is not None:
                with torch.no_grad():
                    # Its unit is the start, as that of a weight's scale.
                    clip.sub_(start * moments.step(clip.grad * start), alpha=self.method.clip_reach * share)
                    clip.clamp_(min=start * 0.1, max=start * 10)
                clip.grad = None

    def _climb(self, batches: list[int]) -> None:
        """Move the rounded weights to where the loss is about the highest within the radius (SAM, equation 2)."""
        self.add_gradients(batches)
        module = self.block.module
        slopes = [
            (state.view.get(module), state.view.of(gradient))
            for state, _ in self.learned
            if (gradient := module.get_parameter(state.view.parameter).grad) is not None
        ]
        steepness = math.sqrt(sum(float(slope.float().square().sum()) for _, slope in slopes))
        whole = math.sqrt(sum(float(value.float().square().sum()) for value, _ in slopes))
        if 0 < steepness < math.inf:
            for value, slope in slopes:
                value.add_(slope, alpha=RADIUS * whole / steepness)
        self.clear_gradients()

    def _write(self, share: float) -> None:
        """Set the block's weights to a mean of the float and the rounded ones. share: of the float ones."""
        for state, learned in self.learned:
            assert isinstance(learned, TrainedWeight)
            learned.value(state.view.get(self.block.module), share)
