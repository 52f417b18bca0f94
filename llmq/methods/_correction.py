"""Correct a block's weights, in their order of use, for the errors of what was quantized before them.

Weights that share an input are a stage. A stage's correction is computed from sums over both chains, and its strength
chosen on tokens that are kept back. The arithmetic is in `llmq.numerics.correction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmq import ranks
from llmq.block.block import Block, WeightState
from llmq.block.chains import Chains
from llmq.block.moments import Apart, Moments, compare
from llmq.block.statistics import Statistic
from llmq.grids.base import pieces
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
    block: Block,
    states: Sequence[WeightState],
    chains: Chains,
    needs: Iterable[type[Statistic]],
    how: str,
    mine: Sequence[slice | None] | None = None,
) -> tuple[list[Corrected | None], dict[type[Statistic], Statistic]]:
    """The corrected weights of a stage, and the statistics of its inputs in the quantized chain: those in `needs`.

    how: 'held-out' chooses the strength of each term on tokens of every eighth window, 'full' is strength 1; mine: the
    rows of each weight that this rank quantizes, by default all: others are not computed.
    """
    moments, held = Moments(states[0].value.shape[1], needs, block.device), list[list[Apart]]()
    windows, counts = ranks.gather(len(hidden) for hidden in block.inputs), None
    places = ranks.mine(len(windows))
    for hand in ranks.hands(len(block.inputs)):
        kept = list[Apart]()
        held.append([])
        for index in hand:
            exact, found, counts = chains.see(states, index, counts)
            if found[0].inputs:
                apart = compare(states, exact, found, not block.partial)
                tokens = _held_out(windows, places[index], len(apart.rows)) if how == "held-out" else None
                if tokens is not None and bool(tokens.any()):
                    tokens = tokens.to(block.device)
                    held[-1].append(apart.of(tokens))
                    apart = apart.of(~tokens)
                if ranks.size() == 1:
                    moments.update([apart])
                else:
                    kept.append(apart.kept())
        if ranks.size() > 1:
            moments.update(kept)
    usual = 1.0 if how == "full" else UNCHOSEN
    chosen = [(usual, usual)] * len(states)
    if any(ranks.everyone(any(held))):
        chosen = _strengths(states, moments, held)
        # Without the tokens held back in it, the correction is worse: KL + 2 % with 32 windows.
        for aparts in held:
            moments.update(aparts)
    mine = [slice(0, len(state.value)) for state in states] if mine is None else mine
    wanted = any(any(by) for by, own in zip(chosen, mine, strict=True) if own is not None)
    lower = factor(moments.hessian, DAMPING) if wanted else None
    corrected = _solve(states, mine, moments, lower, chosen)
    return corrected, moments.statistics


def _strengths(
    states: Sequence[WeightState], moments: Moments, held: Sequence[Sequence[Apart]]
) -> list[tuple[float, float]]:
    """The strengths of each weight of a stage. held: tokens that are not in the sums, of each hand of batches."""
    lower = factor(moments.hessian, DAMPING)
    fits = [_Fitted(state, moments, lower) for state in states]
    for aparts in held:
        for fitted in fits:
            ranks.relay_state(vars(fitted.fit), partial(fitted.add, aparts), torch.device("cpu"))
    return [fitted.strengths() for fitted in fits]


def _held_out(sizes: Sequence[int], index: int, count: int) -> Tensor | None:
    """Which of a batch's tokens, bool [count], are kept back: evenly spread over every eighth window, or the last one.

    sizes: the windows of every batch. None if there is one window, or the tokens are not those of the batch's windows.
    """
    windows, first = sum(sizes), sum(sizes[:index])
    if windows == 1 or count % sizes[index]:
        return None
    chosen = range(HELD_OUT - 1, windows, HELD_OUT) or range(windows - 1, windows)
    length = count // sizes[index]
    taken = torch.linspace(0, length - 1, min(length, max(1, HELD_TOKENS // len(chosen)))).long()
    tokens = torch.zeros(sizes[index], length, dtype=torch.bool)
    for window in set(chosen).intersection(range(first, first + sizes[index])):
        tokens[window - first, taken] = True
    return tokens.flatten()


class _Fitted:
    """The choice of a weight's strengths: what the terms of some of its outputs do to batches that are not in them."""

    def __init__(self, state: WeightState, moments: Moments, lower: Tensor | None) -> None:
        self.state, rows = state, state.value.shape[0]
        self.outputs = torch.linspace(0, rows - 1, min(SAMPLED, rows), device=moments.hessian.device).long()
        terms = [] if lower is None else moments.terms(state, self.outputs)
        self.changes = [change(term, lower) for term in terms if lower is not None]
        self.by_input = moments.drift is not None
        self.fit = Fit(len(self.changes))

    def add(self, aparts: Iterable[Apart]) -> None:
        """Add tokens."""
        for apart in aparts:
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
    states: Sequence[WeightState],
    mine: Sequence[slice | None],
    moments: Moments,
    lower: Tensor | None,
    strengths: Sequence[tuple[float, float]],
) -> list[Corrected | None]:
    # Multiplied from the right first, the drift is the same for all weights: cheaper if they have many outputs.
    drift, shared = moments.drift, None
    wide = drift is not None and sum(len(state.value) for state in states) > 2 * len(drift)
    used = any(by_input for (by_input, _), own in zip(strengths, mine, strict=True) if own is not None)
    if lower is not None and drift is not None and wide and used:
        shared = change(drift, lower)
    return [
        _solved(state, own, moments, lower, shared, *by) if own is not None else None
        for state, by, own in zip(states, strengths, mine, strict=True)
    ]


def _solved(
    state: WeightState,
    own: slice,
    moments: Moments,
    lower: Tensor | None,
    shared: Tensor | None,
    by_input: float,
    by_stream: float,
) -> Corrected:
    """The corrected rows `own` of a weight."""
    by_input = 0.0 if lower is None or moments.drift is None else by_input
    by_stream = 0.0 if lower is None or state.parameter not in moments.streams else by_stream
    value = state.value[own].to(torch.float32, copy=True)
    # Piece by piece, so that the bytes of a row do not depend on which others this rank has.
    for piece in pieces(len(value), state.scheme, value.device):
        rows = value[piece]
        term = None
        if by_input and shared is None and moments.drift is not None:
            term = (rows @ moments.drift).mul_(by_input)
        if by_stream:
            more = by_stream * moments.streams[state.parameter][own][piece]
            term = more if term is None else term.add_(more)
            del more
        found = None if lower is None or term is None else change(term, lower)
        del term
        if by_input and shared is not None:
            rows += (rows @ shared).mul_(by_input)
        if found is not None:
            rows += found
    return Corrected(value, (by_input, by_stream if state.parameter in moments.adding else None))
