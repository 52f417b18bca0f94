"""Outlier Suppression (Wei et al. 2022, arXiv:2209.13325): the norm's gain moves into the weights, tokens are clipped.

Gamma migration (§4.1): a norm's weight is where outlier channels come from; with the gain moved into the matrices that
follow, the norm's output is as even as its input. Token-wise clipping (§4.2): static scales are searched among
quantiles of the tokens' largest magnitudes, coarse to fine, since a few unimportant tokens stretch the range of all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from llmq.balance import Candidate, balance, rounded_output_error, side
from llmq.block import Block, Work
from llmq.methods.base import Method
from llmq.numerics.activations import static_scale
from llmq.statistics import Inputs

COARSE = (0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)
FINE = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)


class OutlierSuppression(Method):
    """Moves the gain of norms into the weights that follow, and clips tokens where activations are static."""

    transform_needs = (Inputs,)
    scheme: ClassVar[dict[str, Any]] = {"bits": 8, "group_size": None, "activations": "dynamic"}

    def transform(self, block: Block) -> None:
        """See `Method.transform`."""
        for pair in block.pairs:
            if pair.kind != "norm" or side(block, pair) is None:
                continue
            source = block.get(pair.source)
            gain = (source if pair.rows is None else source[pair.rows.to(source.device)]) + pair.offset
            gain = gain.abs()
            scale = torch.where(gain > 0, gain, 1.0)
            balance(block, pair, [Candidate("the norm's gain", scale)], "outlier suppression")
        static = [w for w in block.weights.values() if w.scheme.activations and not w.scheme.activations.dynamic]
        if static:
            block.observe(self.transform_needs)
            for work in static:
                clip_tokens(work, block.scale_dtype)


def clip_tokens(work: Work, scale_dtype: torch.dtype) -> None:
    """Give a weight the static input scale with which its output on the sampled rows is nearest to the exact one."""
    rows = work.statistics[Inputs].rows
    sizes = rows.abs().amax(1)
    best, least = sizes.max(), rounded_output_error(work, rows, sizes.max(), scale_dtype)
    for clips in (torch.quantile(sizes, torch.tensor(COARSE, device=sizes.device)), None):
        for clip in [best * factor for factor in FINE] if clips is None else clips:
            error = rounded_output_error(work, rows, clip, scale_dtype)
            if error < least:
                best, least = clip, error
    work.input_scale = static_scale(best, work.scheme.grid)
