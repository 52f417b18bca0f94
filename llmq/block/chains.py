"""A decoder block in two chains: unquantized, and with its weights rounded in their order of use.

What a weight shows in both (its inputs, and what its output is added to) is seen in runs that are broken off as soon as
all that is wanted was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from llmq import ranks
from llmq.block.block import Block
from llmq.block.state import WeightState, rounded_inputs
from llmq.discovery.addends import Counts, Seen, see
from llmq.discovery.calls import of_length
from llmq.discovery.parameters import assign
from llmq.discovery.replay import Replay
from llmq.discovery.view import put
from llmq.machine import to_device
from llmq.spill import Saving, keep, rest_one, saves

T = TypeVar("T")
Both = tuple[Counts | None, Counts | None]
"""The counts of a run of each chain."""
ROOM = 2**30
"""The most bytes of what weights of an unquantized block show that are kept; else its runs are repeated."""
REPLAYED = 2**29
"""The most bytes that are kept of all runs of the quantized block; what is not is computed again in the next."""


def stages(block: Block) -> list[list[WeightState]]:
    """The block's weights in the order of their first use, in a run of its first batch; those with one input together.

    What this batch does not use comes last.
    """
    states, used = list(block.weights.values()), dict[str, tuple[bool, int]]()
    if ranks.rank() == 0:
        with rounded_inputs(block.module, states):
            seen, _ = see(block.module, [state.view for state in states], lambda: block.output(0))
        used = {state.parameter: (not one.inputs, one.first) for state, one in zip(states, seen, strict=True)}
    used = ranks.tell(used)
    found: dict[int, list[WeightState]] = {}
    for state in sorted(states, key=lambda state: used[state.parameter]):
        found.setdefault(state.input_id, []).append(state)
    return list(found.values())


def run_unquantized(block: Block, step: Callable[[int], T], *, whole: bool = True) -> list[T]:
    """Run the unquantized block: the result of `step` for every batch, which runs the block in its chain.

    What the weights show is kept for the corrections (`Block.shown`) if that takes at most 1 GiB; else, unless `whole`,
    the remaining batches are not run.
    """
    states, results, shown, fits = list(block.weights.values()), list[T](), list[dict[str, Seen]](), True
    for index in range(len(block.inputs)):
        with torch.no_grad(), of_length("a block", block.inputs[index].shape[-2]):
            if fits:
                views = [state.view for state in states]
                seen, _ = see(block.module, views, partial(_keep, results, step, index))
                shown.append(_kept(states, seen))
                fits = index > 0 or len(block.inputs) * _nbytes(shown[0]) <= ROOM
            elif whole:
                results.append(step(index))
    block.shown = shown if fits else None
    return results


def _keep(results: list[T], step: Callable[[int], T], index: int) -> None:
    results.append(step(index))


def _kept(states: Sequence[WeightState], seen: Sequence[Seen]) -> dict[str, Seen]:
    """What weights show, on the CPU, by parameter; an input that several share is there once."""
    distinct = {id(x): x for one in seen for x in one.inputs}
    inputs = {key: keep(x.cpu(), Saving.STATES) for key, x in distinct.items()}

    def with_addends(one: Seen) -> Seen:
        addends = [keep(addend.cpu(), Saving.STATES) for addend in one.addends]
        return replace(one, inputs=[inputs[id(x)] for x in one.inputs], addends=addends)

    return {state.parameter: with_addends(one) for state, one in zip(states, seen, strict=True)}


def _nbytes(shown: dict[str, Seen]) -> int:
    kept = {id(x): x.nbytes for one in shown.values() for x in (*one.inputs, *one.addends)}
    return sum(kept.values())


def replayed(block: Block, index: int) -> AbstractContextManager[object]:
    """Within the context, a run of batch `index` goes on from what corrections computed, if all weights are rounded."""
    return nullcontext() if block.replays is None else block.replays[index]


class Chains:
    """A block's parameters twice: unrounded, and rounded as far as its weights are quantized."""

    def __init__(self, block: Block) -> None:
        self.block = block
        names = dict.fromkeys(state.view.parameter for state in block.weights.values())
        self.unrounded = {name: block.module.get_parameter(name).data for name in names}
        self.rounded = dict(self.unrounded)
        self.changing = {state.parameter: state.view for state in block.weights.values()}
        if not saves(Saving.PRODUCTS):
            block.replays = [Replay(REPLAYED // len(block.inputs)) for _ in block.inputs]
        if block.shown is None:
            run_unquantized(block, self._unquantized, whole=False)

    def round(self, states: Iterable[WeightState]) -> None:
        """Round weights that are quantized by now; what they showed is not needed any more."""
        states = list(states)
        for state in states:
            del self.changing[state.parameter]
            for shown in self.block.shown or ():
                shown.pop(state.parameter, None)
        self._use(self.rounded)
        module = self.block.module
        put(module, ((state.view, state.result()) for state in states))
        for name in {state.view.parameter for state in states}:
            assign(module, name, keep(module.get_parameter(name).data, Saving.PASSES))
        self.rounded = {name: module.get_parameter(name).data for name in self.unrounded}
        self._use(self.unrounded)

    def see(self, states: Sequence[WeightState], index: int, until: Both | None) -> tuple[list[Seen], list[Seen], Both]:
        """What the unquantized and the quantized block show of some weights for batch `index`, and the counts of both.

        until: the counts of another batch, at which the runs are broken off.
        """
        block, views = self.block, [state.view for state in states]
        first, second = until or (None, None)
        with torch.no_grad(), of_length("a block", block.inputs[index].shape[-2]):
            if block.shown is not None:
                exact = [block.shown[index][state.parameter].moved(block.device) for state in states]
            else:
                exact, first = see(block.module, views, lambda: self._unquantized(index), first)
            self._use(self.rounded)
            try:
                replay = None if block.replays is None else block.replays[index]
                changing = [*self.changing.values()]
                with rounded_inputs(block.module, block.weights.values()):
                    found, second = see(block.module, views, lambda: self._quantized(index), second, replay, changing)
            finally:
                self._use(self.unrounded)
        return exact, found, (first, second)

    def _unquantized(self, index: int) -> Tensor:
        assert self.block.unquantized is not None
        inputs, calls = self.block.unquantized
        return calls[index].run(self.block.module, to_device(inputs[index], self.block.device))

    def _quantized(self, index: int) -> Tensor:
        inputs = to_device(self.block.inputs[index], self.block.device)
        return self.block.calls[index].run(self.block.module, inputs)

    def _use(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            rest_one(self.block.module.get_parameter(name).data)
            assign(self.block.module, name, value)
