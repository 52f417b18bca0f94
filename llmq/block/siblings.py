"""Weights of which a server makes one matrix, and what their grid wants them to have in common.

More weights are taken than servers join (`planning.fused` has the rule): what they share costs them nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmq.block.block import Block, WeightState
from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme


def siblings(states: Iterable[WeightState]) -> list[list[WeightState]]:
    """The weights that have one input, one parent module and one scheme."""
    together: dict[tuple[int, str, Scheme], list[WeightState]] = {}
    for state in states:
        together.setdefault((state.input_id, state.name.rpartition(".")[0], state.scheme), []).append(state)
    return list(together.values())


def join(block: Block) -> None:
    """Give a block's results, which must all exist, what they must have in common."""
    for states in siblings(block.weights.values()):
        found = [state.quantized for state in states if state.quantized is not None]
        joined = rounding_of(states[0].scheme.rules).join(found, block.scale_dtype)
        for state, quantized in zip(states, joined, strict=True):
            state.quantized = quantized
