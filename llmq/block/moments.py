"""How far a block's two chains are apart: the sums over tokens from which its weights are corrected.

The arithmetic is in `numerics.correction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from llmq import ranks
from llmq.block.block import Block, WeightState
from llmq.block.chains import Chains
from llmq.block.passes import add
from llmq.block.products import fast, parts
from llmq.block.statistics import Hessian, Statistic
from llmq.discovery.addends import Seen
from llmq.grids.base import pieces
from llmq.spill import Saving, rest, saves, zeros

HELD_OUT = 8
"""One window in this many has tokens that choose the strengths; they are added to the sums afterwards."""
HELD_TOKENS = 2048
"""How many tokens choose them, at most."""


@dataclass
class Apart:
    """How far the two chains are apart in one batch, or in some of its tokens.

    rows: x̂ [tokens, in] as the quantized block multiplies it; drift: x − x̂, float32, or in its place, once it is
    multiplied, outputs: by parameter, W (x − x̂), float32 [tokens, out]; streams: by parameter, r − r̂, float32
    [tokens, out], of weights whose output is added to a stream (adding). Zeros are left out, and what cannot be
    compared because the two runs differ in their numbers of tokens.
    """

    rows: Tensor
    drift: Tensor | None
    streams: dict[str, Tensor]
    adding: frozenset[str]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def of(self, tokens: Tensor) -> Apart:
        """The same of some tokens, bool [tokens]."""
        streams, outputs = ({name: one[tokens] for name, one in of.items()} for of in (self.streams, self.outputs))
        drift = None if self.drift is None else self.drift[tokens]
        return Apart(self.rows[tokens], drift, streams, self.adding, outputs)

    def multiplied(self, states: Sequence[WeightState]) -> Apart:
        """The same with the stage's outputs in place of the drift, if it has few (`few_outputs`)."""
        outs, width = sum(len(state.value) for state in states), states[0].value.shape[1]
        if self.drift is None or not few_outputs(outs, width):
            return self
        outputs = {state.parameter: _product(self.drift, state) for state in states}
        return replace(self, drift=None, outputs=outputs)

    def kept(self) -> Apart:
        """The same on the CPU."""
        return ranks.moved(self, "cpu")  # type: ignore[no-any-return]

    def wanted(self, state: WeightState, outputs: Tensor) -> Tensor | None:
        """The change of some of a weight's outputs that makes up for both, float32 [tokens, outputs]; None for none."""
        parts = []
        if self.drift is not None:
            parts.append(self.drift @ state.value[outputs].float().t())
        if state.parameter in self.outputs:
            parts.append(self.outputs[state.parameter][:, outputs])
        if state.parameter in self.streams:
            parts.append(self.streams[state.parameter][:, outputs])
        return sum(parts[1:], parts[0]) if parts else None


def few_outputs(outs: int, width: int) -> bool:
    """Whether a stage's weights have together at most half as many outputs as inputs: sums of W (x − x̂) x̂ᵀ take at most
    half of the memory of the sum of (x − x̂) x̂ᵀ then, and no more time."""
    return 2 * outs <= width


def compare(states: Sequence[WeightState], exact: Sequence[Seen], found: Sequence[Seen], whole: bool) -> Apart:
    """How far a run of the quantized block (found) is from one of the unquantized block (exact).

    whole: whether nothing stands in for a part of the block's values.
    """
    rows, streams, adding = found[0].rows, {}, set()
    for state, one, other in zip(states, exact, found, strict=True):
        # Of several addends one may be a stand-in, if not the whole block is run.
        r, now = (seen.stream if whole or len(seen.addends) == 1 else None for seen in (one, other))
        if r is not None and now is not None and now.shape == (len(rows), state.value.shape[0]):
            adding.add(state.parameter)
            if (apart := _difference(r, now)) is not None:
                streams[state.parameter] = apart
    drift = _difference(exact[0].rows, rows) if exact[0].inputs else None
    return Apart(rows, drift, streams, frozenset(adding))


def _product(drift: Tensor, state: WeightState) -> Tensor:
    """W (x − x̂) of a drift, float32 [tokens, out], some rows of the weight after others."""
    found = torch.empty(len(drift), len(state.value), device=drift.device)
    for piece in pieces(len(state.value), state.scheme, drift.device):
        with fast(state.value.dtype, drift.device):
            found[:, piece] = drift @ state.value[piece].float().t()
    return found


def _difference(exact: Tensor, found: Tensor) -> Tensor | None:
    """What two tensors of one shape differ by, float32; None if they do not, or have other shapes."""
    if exact.shape != found.shape or torch.equal(exact, found.to(exact.dtype)):
        return None
    return exact.to(torch.float32, copy=True).sub_(found)


class Moments:
    """Sums over tokens for one stage.

    statistics: of the quantized chain's inputs, the Hessian Σ x̂ x̂ᵀ among them; drift: Σ (x − x̂) x̂ᵀ, float32 [in, in],
    or outputs: by parameter, Σ W (x − x̂) x̂ᵀ, float32 [out, in]; drifts: whether there is any; streams: by parameter,
    Σ (r − r̂) x̂ᵀ, float32 [out, in], of those in `adding`, unless it is zero.
    """

    def __init__(self, width: int, needs: Iterable[type[Statistic]], device: torch.device) -> None:
        kinds: list[type[Statistic]] = [Hessian, *(need for need in needs if need is not Hessian)]
        self.width, self.device = width, device
        self.statistics = {kind: kind(width, device) for kind in kinds}
        self.drift: Tensor | None = None
        self.drifts = False
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self.adding: frozenset[str] = frozenset()

    @property
    def hessian(self) -> Tensor:
        """Σ x̂ x̂ᵀ, float32 [in, in]."""
        hessian = self.statistics[Hessian]
        assert isinstance(hessian, Hessian)
        return hessian.total

    def update(self, aparts: Sequence[Apart]) -> None:
        """Add tokens: those of a hand of batches, of every rank."""
        self.update_statistics(aparts)
        self.update_differences(aparts)

    def update_statistics(self, aparts: Sequence[Apart]) -> None:
        """Add them to the statistics alone."""
        for statistic in self.statistics.values():
            add(statistic, None, [apart.rows for apart in aparts], self.device)

    def update_differences(self, aparts: Sequence[Apart]) -> None:
        """Add them to the sums of differences alone."""
        width, device = self.width, self.device
        drifts = any(ranks.everyone(any(apart.drift is not None for apart in aparts)))
        if drifts and self.drift is None:
            self.drift = zeros((width, width), torch.float32, device, Saving.PASSES)
        for sums, found in (
            (self.outputs, [apart.outputs for apart in aparts]),
            (self.streams, [apart.streams for apart in aparts]),
        ):
            wide = {name: one.shape[1] for by_name in found for name, one in by_name.items()}
            for name, out in sorted(item for every in ranks.everyone(wide) for item in every.items()):
                if name not in sums:
                    sums[name] = zeros((out, width), torch.float32, device, Saving.PASSES)
        self.drifts |= drifts or bool(self.outputs)
        adding = frozenset[str]().union(*(apart.adding for apart in aparts))
        self.adding = self.adding.union(*ranks.everyone(adding))
        adds: list[tuple[Tensor, Callable[[], object]]] = []
        if self.drift is not None:
            added = [(apart.drift, apart.rows) for apart in aparts if apart.drift is not None]
            adds += _adding(self.drift, added)
        for name, total in sorted(self.outputs.items()):
            adds += _adding(total, [(apart.outputs[name], apart.rows) for apart in aparts if name in apart.outputs])
        for name, total in sorted(self.streams.items()):
            adds += _adding(total, [(apart.streams[name], apart.rows) for apart in aparts if name in apart.streams])
        ranks.relay(adds)

    def terms(self, state: WeightState, outputs: Tensor | None = None) -> list[Tensor]:
        """What a weight's correction is the sum of, before it is multiplied by (Ĥ + λ)⁻¹: [outputs, in], float32."""
        rows = slice(None) if outputs is None else outputs
        found = [] if self.drift is None else [state.value[rows].float() @ self.drift]
        return found + [sums[state.parameter][rows] for sums in (self.outputs, self.streams) if state.parameter in sums]


def part(total: Tensor, own: slice) -> Tensor:
    """Some rows of a sum, which is not kept for them."""
    return total if len(total[own]) == len(total) else total[own].clone()


def _adding(total: Tensor, added: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Callable[[], object]]]:
    """What adds Σ l xᵀ of each (l, x) to each part of a sum, and that part."""
    return [(some, partial(_add_products, some, part, added)) for some, part in parts(total)]


def _add_products(total: Tensor, part: slice, added: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add Σ l xᵀ over tokens to a part of a sum: l may be rounded, the sum may not (books8m, 4 bits: KL + 1 %)."""
    for left, rows in added:
        with fast(rows.dtype, total.device):
            total.addmm_(left[:, part].to(total.device).t(), rows.to(total.device, torch.float32))


def collect(
    block: Block, states: Sequence[WeightState], chains: Chains, needs: Iterable[type[Statistic]], *, hold: bool
) -> tuple[Moments, list[list[Apart]]]:
    """The sums of a stage over all batches, and the tokens that are held back from them, of each hand of batches.

    hold: whether some are, of every eighth window, or of the last one.
    """
    moments, held = Moments(states[0].value.shape[1], needs, block.device), list[list[Apart]]()
    windows, counts = ranks.gather(len(hidden) for hidden in block.inputs), None
    places = ranks.mine(len(windows))
    # With little memory, not all sums are in it at once: the block is run again for the others.
    every = saves(Saving.PASSES)
    for update in (moments.update_statistics, moments.update_differences) if every else (moments.update,):
        first = not held
        for hand in ranks.hands(len(block.inputs)):
            kept = list[Apart]()
            aside = list[Apart]()
            for index in hand:
                exact, found, counts = chains.see(states, index, counts)
                if found[0].inputs:
                    apart = compare(states, exact, found, not block.partial)
                    exact.clear()
                    found.clear()
                    tokens = _held_out(windows, places[index], len(apart.rows)) if hold else None
                    if tokens is not None and bool(tokens.any()):
                        tokens = tokens.to(block.device)
                        # Drifts are multiplied apart: how many tokens there are may change a product's bytes.
                        aside += [apart.of(tokens).multiplied(states)] if first else []
                        apart = apart.of(~tokens)
                    # Where statistics are collected in a run of their own, nothing else is wanted of it.
                    if update != moments.update_statistics:
                        apart = apart.multiplied(states)
                    if ranks.size() == 1:
                        update([apart])
                    else:
                        kept.append(apart.kept())
                    del apart
            if ranks.size() > 1:
                update(kept)
            if first:
                held.append(aside)
        rest()
    return moments, held


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
