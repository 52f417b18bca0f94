"""Outlier Suppression+ (Wei et al. 2023, arXiv:2304.09145): channels are centred by a shift, and scaled.

Outliers are in few channels and mostly of one sign: z = (max + min)/2 per channel (equation 2) is subtracted if biases
can compensate for it, then s = max(1, half range / t) (equation 8) with the threshold t searched for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from llmq.block.block import Block
from llmq.block.statistics import Inputs
from llmq.errors import LlmqError
from llmq.methods._pair_scales import Candidate, Side, balance, side
from llmq.methods.base import Method


class OutlierSuppressionPlus(Method):
    """Centres channels if biases can compensate for it, and scales down those beyond a threshold.

    thresholds: number of thresholds that are tried for each pair.
    """

    transform_needs = (Inputs,)
    scheme: ClassVar[dict[str, Any]] = {"bits": 8, "group_size": None, "activations": "dynamic"}

    def __init__(self, *, thresholds: int = 20) -> None:
        if thresholds < 1:
            raise LlmqError(f"thresholds must be 1 or more, not {thresholds!r}")
        self.thresholds = thresholds

    def transform(self, block: Block) -> None:
        """See `Method.transform`."""
        for pair in block.pairs:
            found = side(block, pair)
            if found is not None:
                balance(block, pair, self._candidates(found, pair.shiftable), "outlier suppression+")

    def _candidates(self, found: Side, shiftable: bool) -> Iterator[Candidate]:
        largest = found.low.abs().maximum(found.high.abs())
        centre = (found.high + found.low) / 2
        for shift in (None, centre) if shiftable else (None,):
            half = largest if shift is None else (found.high - found.low) / 2
            top, bottom = half.max().clamp_min(1e-5), half.median().clamp_min(1e-5)
            for step in range(self.thresholds + 1):
                threshold = top * (bottom / top) ** (step / self.thresholds)
                what = f"threshold {float(threshold):.3g}" + ("" if shift is None else ", shifted")
                yield Candidate(what, torch.clamp(half / threshold, min=1.0), shift)
