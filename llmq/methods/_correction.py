"""Correct a block's weights, in their order of use, for the errors of what was quantized before them.

Weights that share an input are a stage. A stage's correction is computed from sums over both chains, and its strength
chosen on tokens that are kept back. The arithmetic is in `llmq.numerics.correction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.block.chains import Both, Chains
from llmq.block.moments import Apart, Moments, compare
from llmq.block.statistics import Statistic
from llmq.numerics.correction import Fit, change, factor

HOW = ("held-out", "full", "none")
HELD_OUT = 8
"""One window in this many has tokens that choose the strengths; they are added to the sums afterwards."""
HELD_TOKENS = 2048
"""How many tokens choose them, at most."""
UNCHOSEN = 0.5
"""The strength if there is only one window."""
SAMPLED = 256
"""How many outputs of a weight choose its strengths."""
DAMPING = 0.01


@dataclass
class Corrected:
    """What is quantized in place of a weight, float32 [out, in]; strengths: see `WeightState.correction`."""

    value: Tensor
    strengths: tuple[float, float | None]


def correct(
    block: Block, states: Sequence[WeightState], chains: Chains, needs: Iterable[type[Statistic]], how: str
) -> tuple[list[Corrected], dict[type[Statistic], Statistic]]:
    """The corrected weights of a stage, and the statistics of its inputs in the quantized chain: those in `needs`.

    how: 'held-out' chooses the strength of each term on tokens of every eighth window, 'full' is strength 1.
    """
    moments, held = Moments(states[0].value.shape[1], needs, block.device), list[Apart]()
    counts: Both | None = None
    for index in range(len(block.inputs)):
        exact, found, counts = chains.see(states, index, counts)
        if found[0].inputs:
            apart = compare(states, exact, found, not block.partial)
            tokens = _held_out(block, index, len(apart.rows)) if how == "held-out" else None
            if tokens is not None and bool(tokens.any()):
                held.append(apart.of(tokens))
                apart = apart.of(~tokens)
            moments.update(apart)
    lower = factor(moments.hessian, DAMPING) if held else None
    fits = [_Fitted(state, moments, lower) for state in states] if held else []
    for apart in held:
        for fitted in fits:
            fitted.update(apart)
        moments.update(apart)
    usual = 1.0 if how == "full" else UNCHOSEN
    chosen = [fitted.strengths() for fitted in fits] or [(usual, usual)] * len(states)
    # Without the tokens held back in it, the correction is worse: KL + 2 % with 32 windows.
    lower = factor(moments.hessian, DAMPING) if any(map(any, chosen)) else None
    corrected = _solve(states, moments, lower, chosen)
    return corrected, moments.statistics


def _held_out(block: Block, index: int, count: int) -> Tensor | None:
    """Which of a batch's tokens, bool [count], are kept back: evenly spread over every eighth window, or the last one.

    None if there is one window, or the tokens are not those of the batch's windows.
    """
    sizes = [len(hidden) for hidden in block.inputs]
    windows, first = sum(sizes), sum(sizes[:index])
    if windows == 1 or count % sizes[index]:
        return None
    chosen = range(HELD_OUT - 1, windows, HELD_OUT) or range(windows - 1, windows)
    length = count // sizes[index]
    taken = torch.linspace(0, length - 1, min(length, max(1, HELD_TOKENS // len(chosen)))).long()
    tokens = torch.zeros(sizes[index], length, dtype=torch.bool)
    for window in set(chosen).intersection(range(first, first + sizes[index])):
        tokens[window - first, taken] = True
    return tokens.flatten().to(block.device)


class _Fitted:
    """The choice of a weight's strengths: what the terms of some of its outputs do to batches that are not in them."""

    def __init__(self, state: WeightState, moments: Moments, lower: Tensor | None) -> None:
        self.state, rows = state, state.value.shape[0]
        self.outputs = torch.linspace(0, rows - 1, min(SAMPLED, rows), device=moments.hessian.device).long()
        terms = [] if lower is None else moments.terms(state, self.outputs)
        self.changes = [change(term, lower) for term in terms if lower is not None]
        self.by_input = moments.drift is not None
        self.fit = Fit(len(self.changes))

    def update(self, apart: Apart) -> None:
        """Add tokens."""
        wanted = apart.wanted(self.state, self.outputs)
        if self.changes and wanted is not None:
            rows = apart.rows.float()
            self.fit.update([rows @ one.t() for one in self.changes], wanted)

    def strengths(self) -> tuple[float, float]:
        """The strengths of least error on these tokens, for the input and for the stream; 0 for what is not there."""
        found = list(self.fit.strengths()) if self.changes else []
        by_input = found.pop(0) if found and self.by_input else 0.0
        return by_input, found.pop(0) if found else 0.0


def _solve(
    states: Sequence[WeightState], moments: Moments, lower: Tensor | None, strengths: Sequence[tuple[float, float]]
) -> list[Corrected]:
    # Multiplied from the right first, the drift is the same for all weights: cheaper if they have many outputs.
    shared = None
    if lower is not None and moments.drift is not None and any(by_input for by_input, _ in strengths):
        wide = sum(len(state.value) for state in states) > 2 * len(moments.drift)
        shared = change(moments.drift, lower) if wide else None
    made = []
    for state, (by_input, by_stream) in zip(states, strengths, strict=True):
        value = state.value.float()
        by_input = 0.0 if lower is None or moments.drift is None else by_input
        by_stream = 0.0 if lower is None or state.parameter not in moments.streams else by_stream
        term = None
        if by_input and shared is None and moments.drift is not None:
            term = (value @ moments.drift).mul_(by_input)
        if by_stream:
            more = by_stream * moments.streams[state.parameter]
            term = more if term is None else term.add_(more)
            del more
        found = None if lower is None or term is None else change(term, lower)
        del term
        if by_input and shared is not None:
            value = torch.addmm(value, value, shared, alpha=by_input)
        if found is not None:
            value = value + found
        made.append(Corrected(value, (by_input, by_stream if state.parameter in moments.adding else None)))
    return made
