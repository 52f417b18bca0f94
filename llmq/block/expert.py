"""One routed expert as a block: its inputs are the tokens that chose it, few of them for a rare expert.

A Hessian of few tokens has a low rank, and GPTQ would fit the weights to these tokens alone. So statistics are drawn
towards those of other tokens: H = α · H_own + (1 − α) · H_other, each per token, with α = n / (n + 32) for n tokens of
its own (shrinkage: Ledoit and Wolf, 2004). Of what enters the experts' module, the others are all tokens; of what is
inside, 128 tokens that did not choose this expert are run through it. Rows count by the square of their routing weight
w, because the block's error is Σ w² ‖ΔW x‖²: sums of squares take w · x, with w scaled to a mean square of 1.

With `--route all`, all rows that enter the module are an expert's inputs instead, each with the same weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmq.block.block import Block, WeightState
from llmq.block.statistics import Statistic
from llmq.discovery.experts import ALONE
from llmq.discovery.inputs import Takes, collect
from llmq.discovery.pairs import Pair
from llmq.discovery.view import View

PRIOR_TOKENS = 32
OTHERS = 128
CHUNK_ROWS = 2048


class ExpertBlock(Block):
    """An expert (`discovery.experts.Expert`), as methods see it.

    own: the rows [n, width] that chose it, and weights: their routing weights [n]; others: rows [m, width] that did
    not, which are its inputs if no row did; entering: statistics of all rows that enter the module; outer: the
    `input_id` of the weights that these feed. everyone: all rows that enter the module, in chunks, if they are to be
    its inputs, whoever chose it; its own then count as any others, so its alpha is 0.
    """

    in_passes = False

    def __init__(
        self,
        module: nn.Module,
        states: Sequence[WeightState],
        own: Tensor,
        weights: Tensor,
        others: Tensor,
        entering: Mapping[type[Statistic], Statistic],
        outer: set[int],
        *,
        everyone: Sequence[Tensor] = (),
        pairs: Sequence[Pair] = (),
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        inputs = list(everyone or torch.split(own if len(own) else others, CHUNK_ROWS))
        calls = [ALONE] * len(inputs)
        super().__init__(module, states, inputs, calls, pairs=pairs, scale_dtype=scale_dtype, device=device)
        self.tokens, self.entering, self.outer = len(own), entering, outer
        # Without other rows nothing is drawn towards them.
        shared = self.tokens / (self.tokens + PRIOR_TOKENS) if len(others) else 1.0
        self.alpha = 0.0 if everyone else shared
        self._others = others[:0] if everyone else others
        scale = weights.float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        self._weights = list(torch.split(weights.float() / scale, CHUNK_ROWS)) if len(own) and not everyone else None

    def feeding(self, statistic: Statistic) -> Takes:
        """See `Block.feeding`."""
        weighted = self._weights is not None and getattr(statistic, "QUADRATIC", False)
        return _Weighted(statistic, self._weights or []) if weighted else statistic

    def observe(self, needs: Iterable[type[Statistic]]) -> list[Tensor]:
        """See `Block.observe`; the statistics are drawn towards those of other tokens."""
        needs = tuple(need for need in needs)
        outputs = super().observe(needs)
        blended = [need for need in needs if hasattr(need, "blend")]
        if not blended or not len(self._others):
            return outputs
        inner: dict[int, dict[type[Statistic], Statistic]] = {}
        fed: dict[View, list[Statistic]] = {}
        for state in self.weights.values():
            if state.input_id not in self.outer and state.input_id not in inner:
                inner[state.input_id] = {need: need(state.value.shape[1], self.device) for need in blended}
                fed[state.view] = list(inner[state.input_id].values())
        with torch.no_grad(), collect(self.module, fed):
            self.module(self._others.to(self.device))
        done: set[int] = set()
        for state in self.weights.values():
            if state.input_id in done:
                continue
            done.add(state.input_id)
            other = self.entering if state.input_id in self.outer else inner[state.input_id]
            for need in blended:
                if need in other:
                    state.statistics[need].blend(other[need], self.alpha)
        return outputs


class _Weighted:
    """Passes rows to a statistic, times their weights, one chunk of rows after the other."""

    def __init__(self, statistic: Statistic, weights: list[Tensor]) -> None:
        self.statistic, self.left = statistic, iter(weights)

    def update(self, x: Tensor) -> None:
        """Add x [n, width]."""
        self.statistic.update(x.float() * next(self.left).to(x.device)[:, None])
