"""What a step needs of its batches, and which rank runs each: the batches of a step are shared out evenly among ranks,
and a rank that has too many of them lends some for that step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from llmq import ranks
from llmq.discovery.calls import Call, Recording, States
from llmq.discovery.handed import Handed, Store
from llmq.discovery.matmuls import flat

PLAIN = (Tensor, Handed, Store, bool, int, float, str, torch.dtype, torch.device, type(None))
"""What a rank can give another, in dicts, lists and tuples."""


@dataclass
class Batches:
    """What this rank has, by the number of a batch: what the first block gets, every block's call, and the unquantized
    model's last hidden states, if there will be a loss.

    lends: whether a rank can give another what it has of a batch.
    """

    first: dict[int, States]
    calls: dict[int, list[Call]]
    teacher: dict[int, Tensor]
    lends: bool

    @classmethod
    def dealt(cls, count: int, first: list[States], recording: Recording, teacher: list[Tensor] | None) -> Self:
        """Of so many batches, those that were dealt to this rank."""
        mine = ranks.mine(count)
        calls = dict(zip(mine, recording.calls, strict=False))
        lends = ranks.size() > 1 and all(ranks.everyone(_plain(first, recording)))
        return cls(dict(zip(mine, first, strict=True)), calls, dict(zip(mine, teacher or [], strict=False)), lends)

    def runners(self, batches: Sequence[int]) -> list[int]:
        """Which rank runs each of some batches."""
        return ranks.evenly(batches) if self.lends else ranks.owners(batches)

    @contextmanager
    def shared(self, batches: Sequence[int]) -> Iterator[list[int]]:
        """Which of some batches this rank runs, in their order; within the context, it has what it needs for them."""
        runners, lent = self.runners(batches), []
        for batch, owner, runner in zip(batches, ranks.owners(batches), runners, strict=True):
            if owner == runner:
                continue
            mine = (self.first[batch], self.calls[batch], self.teacher[batch]) if owner == ranks.rank() else None
            if (given := ranks.lend(mine, owner, runner)) is not None:
                self.first[batch], self.calls[batch], self.teacher[batch] = given
                lent.append(batch)
        try:
            yield [batch for batch, runner in zip(batches, runners, strict=True) if runner == ranks.rank()]
        finally:
            # A step may have a batch twice.
            for batch in set(lent):
                del self.first[batch], self.calls[batch], self.teacher[batch]


def _plain(first: list[States], recording: Recording) -> bool:
    """Whether what is recorded is made of tensors and plain values, of the first batch as of all.

    A model's own code may hand anything to its blocks, and not everything can be sent.
    """
    calls = [(call.args, call.kwargs) for every in recording.calls[:1] for call in every]
    return all(isinstance(value, PLAIN) for value in flat((calls, [dict(one.handed) for one in first[:1]])))
