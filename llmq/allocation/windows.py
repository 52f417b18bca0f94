"""The calibration windows that weights are scored on: short ones, some of them kept back to judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.planning.types import BATCH_TOKENS

TOKENS = 512
STATISTICS, SCORED, PROOF = 32, 4, 8


@dataclass(frozen=True)
class Split:
    """Token ids [windows, tokens]: for statistics of the inputs; to score single groups on; to prove allocations on."""

    statistics: Tensor
    scored: Tensor
    proof: Tensor

    def batches(self, judged: Tensor) -> tuple[Sequence[Tensor], int]:
        """The statistics' batches and then the judged ones, and how many these are."""
        last = torch.split(judged, self.batch)
        return [*torch.split(self.statistics, self.batch), *last], len(last)

    @property
    def batch(self) -> int:
        """Windows per forward pass."""
        return max(1, BATCH_TOKENS // self.statistics.shape[1])


def split(ids: Tensor) -> Split:
    """Calibration windows, cut to at most 512 tokens, evenly spread: 32, 4 and 8 of them, or fewer in that proportion.

    Raises LlmqError if there are fewer than three.
    """
    length = min(TOKENS, ids.shape[1])
    pieces = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    if len(pieces) < 3:
        raise LlmqError(f"weights are scored on at least 3 windows, and there are {len(pieces)}: give more --samples")
    most = min(len(pieces), STATISTICS + SCORED + PROOF)
    pieces = pieces[torch.linspace(0, len(pieces) - 1, most).round().long()]
    scored = max(1, most * SCORED // (STATISTICS + SCORED + PROOF))
    proof = max(1, most * PROOF // (STATISTICS + SCORED + PROOF))
    # Every so many windows one is kept back, so that what is judged is spread over the text, too.
    order = torch.arange(most)
    held = torch.zeros(most, dtype=torch.bool)
    held[torch.linspace(0, most - 1, scored + proof).round().long()] = True
    back = order[held]
    mine = torch.zeros(len(back), dtype=torch.bool)
    mine[torch.linspace(0, len(back) - 1, scored).round().long()] = True
    return Split(pieces[~held], pieces[back[mine]], pieces[back[~mine]])
