"""SignRound (Cheng et al. 2023, arXiv:2309.05516): rounding learned by sign-gradient descent on a block's output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.errors import LlmqError
from llmq.grids.base import rounding_of
from llmq.methods.base import Method
from llmq.numerics.learned_rounding import LearnedWeight

# One batch in HELD_OUT is held out to choose the best iterate; iterates are compared LOOKS times.
HELD_OUT = 8
LOOKS = 12
# Lower bound of a token's size in the loss, as a fraction of the mean size.
FLOOR = 0.01
# Momentum of the gradient over steps.
MOMENTUM = 0.8


class SignRound(Method):
    """Learns the rounding direction of each weight, and each scale, from the output of the whole block.

    iterations: steps of sign-gradient descent; minibatch: calibration windows per step, in whole batches; reach: how
    far all steps together can move a weight, in codes (step sizes fall linearly to 0); scale_reach: the same for a
    scale, as a fraction of it.
    """

    float_target = True

    def __init__(
        self,
        *,
        iterations: int = 300,
        minibatch: int = 4,
        reach: float = 0.5,
        scale_reach: float = 0.5,
        seed: int = 0,
    ) -> None:
        if iterations < 1 or minibatch < 1:
            raise LlmqError(f"iterations and minibatch must be 1 or more, not {iterations!r} and {minibatch!r}")
        if not (0 <= reach <= 8 and 0 <= scale_reach < 1):
            raise LlmqError(
                f"reach must lie between 0 and 8 and scale-reach between 0 and 1, not {reach!r} and {scale_reach!r}"
            )
        self.iterations, self.minibatch, self.seed = iterations, minibatch, seed
        self.reach, self.scale_reach = reach, scale_reach

    def refine(self, block: Block) -> None:
        """See `Method.refine`.

        Keeps the iterate with the least error on held-out batches; this may be the start.
        """
        states = [state for state in block.weights.values() if state.quantized is not None]
        if states:
            _Descent(self, block, states).run()

    def workspace(self, shape: tuple[int, ...]) -> int:
        """Positions and momentum in float32, the rounded weight, its gradient, the best codes; a step's temporaries."""
        return (8 + 4 + 4 + 1 + 12) * math.prod(shape)


class _Descent:
    """Sign-gradient descent on one block."""

    def __init__(self, method: SignRound, block: Block, states: list[WeightState]) -> None:
        self.method, self.block = method, block
        self.learned: list[tuple[WeightState, LearnedWeight]] = []
        for state in states:
            assert state.quantized is not None
            start = rounding_of(state.scheme.rules).reopen(state.quantized)
            self.learned.append((state, LearnedWeight(start, state.value, MOMENTUM)))
        self.generator = torch.Generator().manual_seed(method.seed)
        order = torch.randperm(len(block.inputs), generator=self.generator).tolist()
        count = math.ceil(len(order) / HELD_OUT) if len(order) > 1 else 0
        self.held, self.train = order[:count] or order, order[count:]

    def run(self) -> None:
        """Run all steps; the best iterate is written to the block's states."""
        method, looks = self.method, max(1, self.method.iterations // LOOKS)
        with self._learning():
            least = self._held_out()
            best = [learned.q for _, learned in self.learned]
            queue: list[int] = []
            size = min(len(self.train), max(1, method.minibatch // self.block.inputs[0].shape[0]))
            for step in range(method.iterations):
                # Linear decay: these sum to 1 over all steps.
                share = 2 * (method.iterations - step) / (method.iterations * (method.iterations + 1))
                while len(queue) < size:
                    queue += [self.train[i] for i in torch.randperm(len(self.train), generator=self.generator)]
                taken, queue = queue[:size], queue[size:]
                self._descend(taken, share)
                if (step + 1) % looks == 0 or step + 1 == method.iterations:
                    now = self._held_out()
                    if now < least:
                        least, best = now, [learned.quantized() for _, learned in self.learned]
        for (state, _), found in zip(self.learned, best, strict=True):
            stored = rounding_of(state.scheme.rules).finish(found, self.block.scale_dtype)
            self.block.set_quantized(state.parameter, stored)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Within the context, every weight and input of the block is rounded; the learned weights have gradients."""
        module = self.block.module
        with self.block.rounding(straight_through=True), torch.enable_grad():
            for state, _ in self.learned:
                module.get_parameter(state.view.parameter).requires_grad_(True)
            yield

    def _descend(self, batches: list[int], share: float) -> None:
        module = self.block.module
        for index in batches:
            loss = self._error(index)
            loss.backward()  # type: ignore[no-untyped-call]
        for state, learned in self.learned:
            gradient = module.get_parameter(state.view.parameter).grad
            if gradient is not None:
                learned.step(state.view.of(gradient), self.method.reach * share, self.method.scale_reach * share)
                learned.value(state.view.get(module))
        for state, _ in self.learned:
            module.get_parameter(state.view.parameter).grad = None

    def _error(self, index: int) -> Tensor:
        """The mean over tokens of the output's squared error, relative to the target's mean square."""
        device = self.block.device
        target = self.block.target[index].to(device, torch.float32)
        output = self.block.calls[index].run(self.block.module, self.block.inputs[index].to(device))
        size = target.square().mean(-1)
        # Relative, as later norms divide each token by its size; the floor keeps tiny tokens from dominating.
        size += FLOOR * size.mean() + torch.finfo(torch.float32).tiny
        return ((output.to(torch.float32) - target).square().mean(-1) / size).mean()

    def _held_out(self) -> float:
        with torch.no_grad():
            return sum(float(self._error(index)) for index in self.held)
