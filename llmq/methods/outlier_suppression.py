"""Outlier Suppression (Wei et al. 2022, arXiv:2209.13325): the norm's gain moves into the weights, tokens are clipped.

Gamma migration (§4.1): outlier channels come from a norm's weight; once this gain is moved into the following matrices,
the norm's output has no more outliers than its input. If a matrix feeds another matrix, the norm of each of its rows is
treated as such a gain (this goes beyond the paper). Token-wise clipping (§4.2): static scales are searched among
quantiles of the tokens' largest magnitudes, coarse to fine, because a few unimportant tokens would stretch the range.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.block.statistics import Inputs
from llmq.grids.activations import static_scale
from llmq.methods._pair_scales import Candidate, balance, rounded_output_error, side
from llmq.methods.base import Method

COARSE = (0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)
FINE = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)


class OutlierSuppression(Method):
    """Moves gains into the following weights, and clips tokens if activations are static."""

    transform_needs = (Inputs,)
    scheme: ClassVar[dict[str, Any]] = {"bits": 8, "group_size": None, "activations": "dynamic"}

    def transform(self, block: Block) -> None:
        """See `Method.transform`."""
        for pair in block.pairs:
            if side(block, pair) is not None:
                gain = pair.gain(block.get(pair.source))
                scale = torch.where(gain > 0, gain / gain.median(), 1.0)
                balance(block, pair, [Candidate("the gain", scale)], "outlier suppression")
        static = [w for w in block.weights.values() if w.scheme.activations and not w.scheme.activations.dynamic]
        if static:
            block.observe(self.transform_needs)
            for input_id in dict.fromkeys(state.input_id for state in static):
                alike = [state for state in static if state.input_id == input_id]
                scale = clip_tokens(alike, block.scale_dtype)
                for state in alike:
                    block.set_input_scale(state.parameter, scale)


def clip_tokens(states: list[WeightState], scale_dtype: torch.dtype) -> Tensor:
    """The static scale of the weights' shared input that gives the least error of their outputs on the sampled rows.

    All of them get the same scale, because servers fuse weights that share an input. Returns float32 [1].
    """
    rows = states[0].statistics[Inputs].rows
    sizes = rows.abs().amax(1)

    def cost(clip: Tensor) -> float:
        return sum(rounded_output_error(state, rows, clip, scale_dtype) for state in states)

    best, least = sizes.max(), cost(sizes.max())
    for clips in (torch.quantile(sizes, torch.tensor(COARSE, device=sizes.device)), None):
        for clip in [best * factor for factor in FINE] if clips is None else clips:
            error = cost(clip)
            if error < least:
                best, least = clip, error
    return static_scale(best, states[0].scheme.grid)
