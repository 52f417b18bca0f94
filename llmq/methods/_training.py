"""Gradient descent on the rounded weights of one block: the steps that signround, block_qat and codebooks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq import ranks
from llmq.block.block import Block, WeightState
from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight, rounding_of

# One batch in HELD_OUT is held out to choose the best iterate; iterates are compared LOOKS times.
HELD_OUT = 8
LOOKS = 12


class Learned(Protocol):
    """A quantized weight that is learned."""

    def value(self, out: Tensor) -> None:
        """Write the rounded weight to `out` [out, in]."""

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against ∂L/∂ŵ [out, in]."""

    def quantized(self) -> Quantized:
        """The current quantized weight."""


class Training:
    """Training of one block's quantized weights, all together, on `Block.loss`.

    make: makes of a start, and of the state of its weight, what is learned; reach, scale_reach: what the rates of all
    steps sum to, in steps of the grid and as a share of a scale (they fall linearly to 0).
    """

    def __init__(
        self,
        block: Block,
        make: Callable[[Any, WeightState], Learned],
        *,
        iterations: int,
        minibatch: int,
        reach: float,
        scale_reach: float,
        seed: int,
    ) -> None:
        self.block, self.iterations, self.minibatch = block, iterations, minibatch
        self.reach, self.scale_reach = reach, scale_reach
        self.learned: list[tuple[WeightState, Learned]] = []
        for state in block.weights.values():
            if state.quantized is not None:
                self.learned.append((state, make(self.opened(state.quantized), state)))
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = ranks.gather(len(hidden) for hidden in block.inputs)
        self.places = {batch: place for place, batch in enumerate(ranks.mine(len(self.sizes)))}
        order = torch.randperm(len(self.sizes), generator=self.generator).tolist()
        count = math.ceil(len(order) / HELD_OUT) if len(order) > 1 else 0
        self.held, self.train = order[:count] or order, order[count:]

    def run(self) -> None:
        """Run all steps; the iterate with the least loss on held-out batches, which may be the start, is written to the
        block's states."""
        looks = max(1, self.iterations // LOOKS)
        with self.learning():
            least, best = self._held_out(), None
            queue: list[int] = []
            size = min(len(self.train), max(1, self.minibatch // self.sizes[0]))
            for step in range(self.iterations):
                # Linear decay: these sum to 1 over all steps.
                share = 2 * (self.iterations - step) / (self.iterations * (self.iterations + 1))
                while len(queue) < size:
                    queue += [self.train[i] for i in torch.randperm(len(self.train), generator=self.generator)]
                taken, queue = queue[:size], queue[size:]
                self.descend(taken, share)
                if (step + 1) % looks == 0 or step + 1 == self.iterations:
                    now = self._held_out()
                    if now < least:
                        least, best = now, self.found()
        if best is not None:
            self.put(best)

    def found(self) -> list[Quantized]:
        """The current weights."""
        return [learned.quantized() for _, learned in self.learned]

    def put(self, found: list[Quantized]) -> None:
        """Write weights to the block's states."""
        for (state, _), q in zip(self.learned, found, strict=True):
            self.block.set_quantized(state.parameter, self.closed(q))

    def opened(self, quantized: Quantized) -> Quantized:
        """A block's weight in the form in which it is learned."""
        return rounding_of(quantized.scheme.rules).reopen(quantized)

    def closed(self, learned: Quantized) -> Quantized:
        """The inverse of `opened`."""
        assert isinstance(learned, QuantizedWeight)
        return rounding_of(learned.scheme.rules).finish(learned, self.block.scale_dtype)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within the context, every weight and input of the block is rounded; the learned weights have gradients."""
        module = self.block.module
        with self.block.rounding(straight_through=True), torch.enable_grad():
            for state, _ in self.learned:
                module.get_parameter(state.view.parameter).requires_grad_(True)
            yield

    def descend(self, batches: list[int], share: float) -> None:
        """One step on some batches. share: of the sum of all rates."""
        self.add_gradients(batches)
        for state, learned in self.learned:
            gradient = self.block.module.get_parameter(state.view.parameter).grad
            if gradient is not None:
                learned.step(state.view.of(gradient), self.reach * share, self.scale_reach * share)
                learned.value(state.view.get(self.block.module))
        self.clear_gradients()

    def add_gradients(self, batches: list[int]) -> None:
        """Set the gradients of the block's parameters to the sums of those of some batches' losses, in this order."""
        if ranks.size() == 1:
            for batch in batches:
                self._loss(batch).backward()  # type: ignore[no-untyped-call]
            return
        leaves, found = self.leaves(), dict[int, list[Tensor | None]]()
        for batch in self.places.keys() & set(batches):
            self._loss(batch).backward()  # type: ignore[no-untyped-call]
            found[batch] = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        for place, leaf in enumerate(leaves):
            mine = {batch: one for batch, every in found.items() if (one := every[place]) is not None}
            having = set[int]().union(*ranks.everyone(set(mine)))
            if ordered := [batch for batch in batches if batch in having]:
                leaf.grad = ranks.total(torch.empty_like(leaf), mine, ordered)

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        names = dict.fromkeys(state.view.parameter for state, _ in self.learned)
        return [self.block.module.get_parameter(name) for name in names]

    def clear_gradients(self) -> None:
        """Free the gradients of the learned parameters."""
        for state, _ in self.learned:
            self.block.module.get_parameter(state.view.parameter).grad = None

    def _loss(self, batch: int) -> Tensor:
        block, index = self.block, self.places[batch]
        return block.loss(index, block.calls[index].run(block.module, block.inputs[index].to(block.device)))

    def _held_out(self) -> float:
        with torch.no_grad():
            mine = {batch: float(self._loss(batch)) for batch in self.held if batch in self.places}
        found = {batch: loss for one in ranks.everyone(mine) for batch, loss in one.items()}
        return sum(found[batch] for batch in self.held)


def check_steps(iterations: int, minibatch: int, reach: float, scale_reach: float, last: str) -> None:
    """Raise LlmqError for options that learning block by block cannot have."""
    if iterations < 1 or minibatch < 1:
        raise LlmqError(f"iterations and minibatch must be 1 or more, not {iterations!r} and {minibatch!r}")
    if not (0 <= reach <= 8 and 0 <= scale_reach < 1):
        raise LlmqError(
            f"reach must lie between 0 and 8 and scale-reach between 0 and 1, not {reach!r} and {scale_reach!r}"
        )
    if last not in ("logits", "output"):
        raise LlmqError(f"last must be 'logits' or 'output', not {last!r}")
