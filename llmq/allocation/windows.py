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


def extra(seqlen: int) -> int:
    """How many windows of so many tokens are read beside those that calibrate, to prove allocations on."""
    return -(-PROOF * TOKENS // seqlen)


def split(ids: Tensor, held: Tensor | None) -> Split:
    """Windows of at most 512 tokens, evenly spread: 32 and 4 of the calibration windows, or fewer in that proportion,
    and 8 of those that are held back.

    Raises LlmqError if there are not enough.
    """
    if held is None or len(pieces := _cut(ids)) < 2:
        raise LlmqError("weights are scored on at least 3 windows of the text: give more --samples")
    most = min(len(pieces), STATISTICS + SCORED)
    pieces = _spread(pieces, most)
    # Spread over the text, too.
    scored = torch.zeros(most, dtype=torch.bool)
    count = max(1, most * SCORED // (STATISTICS + SCORED))
    scored[torch.linspace(most // (2 * count), most - 1, count).round().long()] = True
    back = _cut(held)
    return Split(pieces[~scored], pieces[scored], _spread(back, min(len(back), PROOF)))


def _cut(ids: Tensor) -> Tensor:
    """Windows [n, tokens] as consecutive pieces of at most 512 tokens."""
    length = min(TOKENS, ids.shape[1])
    return ids[:, : ids.shape[1] // length * length].reshape(-1, length)


def _spread(pieces: Tensor, count: int) -> Tensor:
    return pieces[torch.linspace(0, len(pieces) - 1, count).round().long()]
