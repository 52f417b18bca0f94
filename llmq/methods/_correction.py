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
from llmq.block.moments import Apart, Moments, collect, part
from llmq.block.statistics import Statistic
from llmq.grids.base import pieces
from llmq.numerics.correction import Fit, change, factor
from llmq.spill import rest

HOW = ("held-out", "full", "none")
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
    moments, held = collect(block, states, chains, needs, hold=how == "held-out")
    chosen = [(1.0, 1.0) if how == "full" else (UNCHOSEN, UNCHOSEN)] * len(states)
    mine = [slice(0, len(state.value)) for state in states] if mine is None else mine
    if any(ranks.everyone(any(held))):
        by_input = moments.drifts
        terms = [moments.terms(state, _outputs(state, moments)) for state in states]
        # Without the tokens held back in it, the correction is worse: KL + 2 % with 32 windows.
        for number in range(len(held)):
            moments.update_differences(held[number])
        moved = _moved(states, mine, moments)
        chosen = _strengths(states, moments, held, terms, by_input)
        del terms
        while held:
            moments.update_statistics(held.pop(0))
    else:
        moved = _moved(states, mine, moments)
    wanted = any(any(by) for by, own in zip(chosen, mine, strict=True) if own is not None)
    lower = factor(moments.hessian, DAMPING) if wanted else None
    corrected = _solve(states, mine, moments, lower, chosen, moved)
    rest()
    return corrected, moments.statistics


def _moved(states: Sequence[WeightState], mine: Sequence[slice | None], moments: Moments) -> list[Tensor | None]:
    """Σ W (x − x̂) x̂ᵀ of the rows that this rank quantizes of each weight, float32 [out, in]; sums of it are freed.

    None for weights with more than twice as many outputs as inputs: the drift is kept then, as it takes less.
    """
    drift = moments.drift
    if moments.outputs:
        sums = [moments.outputs.pop(state.parameter) for state in states]
        return [None if own is None else part(total, own) for total, own in zip(sums, mine, strict=True)]
    found = list[Tensor | None]([None] * len(states))
    if drift is None or sum(len(state.value) for state in states) > 2 * len(drift):
        return found
    for place, (state, own) in enumerate(zip(states, mine, strict=True)):
        if own is None:
            continue
        rows = state.value[own]
        found[place] = moved = torch.empty(rows.shape, device=rows.device)
        # Piece by piece, so that the bytes of a row do not depend on which others this rank has.
        for piece in pieces(len(rows), state.scheme, rows.device):
            torch.mm(rows[piece].float(), drift, out=moved[piece])
    moments.drift = None
    rest()
    return found


def _outputs(state: WeightState, moments: Moments) -> Tensor:
    """Some of a weight's outputs, which choose its strengths."""
    return torch.linspace(0, len(state.value) - 1, min(SAMPLED, len(state.value)), device=moments.device).long()


def _strengths(
    states: Sequence[WeightState],
    moments: Moments,
    held: Sequence[Sequence[Apart]],
    terms: Sequence[list[Tensor]],
    by_input: bool,
) -> list[tuple[float, float]]:
    """The strengths of each weight. held: tokens that terms do not have; by_input: whether one is the input's."""
    lower = factor(moments.hessian, DAMPING)
    fits = [_Fitted(state, moments, lower, own, by_input) for state, own in zip(states, terms, strict=True)]
    for aparts in held:
        for fitted in fits:
            ranks.relay_state(vars(fitted.fit), partial(fitted.add, aparts), torch.device("cpu"))
    return [fitted.strengths() for fitted in fits]


class _Fitted:
    """The choice of a weight's strengths: what the terms of some of its outputs do to batches that are not in them."""

    def __init__(
        self, state: WeightState, moments: Moments, lower: Tensor | None, terms: Sequence[Tensor], by_input: bool
    ) -> None:
        self.state, self.outputs, self.by_input = state, _outputs(state, moments), by_input
        self.changes = [] if lower is None else [change(term, lower) for term in terms]
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
    moved: list[Tensor | None],
) -> list[Corrected | None]:
    # Multiplied from the right first, the drift is the same for all weights: cheaper if they have many outputs.
    drift, shared = moments.drift, None
    used = any(by_input for (by_input, _), own in zip(strengths, mine, strict=True) if own is not None)
    if lower is not None and drift is not None and used:
        shared = change(drift, lower)
    every = zip(states, strengths, mine, strict=True)
    return [_solved(state, own, moments, lower, moved, shared, *by) for state, by, own in every]


def _solved(
    state: WeightState,
    own: slice | None,
    moments: Moments,
    lower: Tensor | None,
    terms: list[Tensor | None],
    shared: Tensor | None,
    by_input: float,
    by_stream: float,
) -> Corrected | None:
    """The corrected rows `own` of a weight. terms: the first is this weight's, and is taken from there."""
    moved = terms.pop(0)
    if own is None:
        return None
    by_input = 0.0 if lower is None or not moments.drifts else by_input
    by_stream = 0.0 if lower is None or state.parameter not in moments.streams else by_stream
    term = None
    if by_input and moved is not None:
        term = moved.mul_(by_input)
    if by_stream:
        more = moments.streams.pop(state.parameter)[own].mul_(by_stream)
        term = more if term is None else term.add_(more)
        del more
    del moved
    given = state.value[own]
    value = given.to(torch.float32, copy=True) if term is None or lower is None else term
    for piece in pieces(len(given), state.scheme, given.device):
        rows = given[piece].float()
        if term is not None and lower is not None:
            value[piece] = change(term[piece], lower).add_(rows)
        if by_input and shared is not None:
            value[piece].addmm_(rows, shared, alpha=by_input)
    return Corrected(value, (by_input, by_stream if state.parameter in moments.adding else None))
