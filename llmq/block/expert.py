"""One routed expert as a block: its inputs are the tokens that chose it, few of them for a rare expert.

A Hessian of few tokens has a low rank, and GPTQ would fit the weights to these tokens alone. So statistics are drawn
towards those of other tokens: H = α · H_own + (1 − α) · H_other, each per token, with α = n / (n + 32) for n tokens of
its own (shrinkage: Ledoit and Wolf, 2004). Of what enters the experts' module, the others are all tokens; of what is
inside, 128 tokens that did not choose this expert are run through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmq.block.block import Block, WeightState
from llmq.block.statistics import Statistic
from llmq.discovery.experts import ALONE
from llmq.discovery.inputs import collect
from llmq.discovery.pairs import Pair
from llmq.discovery.view import View

PRIOR_TOKENS = 32
OTHERS = 128
CHUNK_ROWS = 2048


class ExpertBlock(Block):
    """An expert (`discovery.experts.Expert`), as methods see it.

    own: the rows [n, width] that chose it; others: rows [m, width] that did not, which are its inputs if no row did;
    entering: statistics of all rows that enter the module; outer: the `input_id` of the weights that these feed.
    """

    def __init__(
        self,
        module: nn.Module,
        states: Sequence[WeightState],
        own: Tensor,
        others: Tensor,
        entering: Mapping[type[Statistic], Statistic],
        outer: set[int],
        *,
        pairs: Sequence[Pair] = (),
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        inputs = list(torch.split(own if len(own) else others, CHUNK_ROWS))
        calls = [ALONE] * len(inputs)
        super().__init__(module, states, inputs, calls, pairs=pairs, scale_dtype=scale_dtype, device=device)
        self.tokens, self.entering, self.outer = len(own), entering, outer
        self.alpha = self.tokens / (self.tokens + PRIOR_TOKENS)
        self._others = others

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
