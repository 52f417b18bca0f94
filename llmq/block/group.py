"""A group of experts that are parts of a block's parameters, as a block with fewer weights.

The whole block is in memory and runs, but only the inputs of the group's weights are collected. Every group has the
inputs of the block with all its other weights quantized and all its experts unquantized, as they would be if the
statistics of all experts were collected in one pass: so what a quantizer makes of them does not depend on the groups.
A refinement learns the experts of a group together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmq.block.block import Block
from llmq.block.statistics import Statistic
from llmq.discovery.inputs import Takes


class GroupBlock(Block):
    """A group of experts. tokens: how many rows each weight multiplied, by `View.name`, in the first `observe`."""

    tokens: dict[str, int] | None = None
    in_passes = False

    def feeding(self, statistic: Statistic) -> Takes:
        """See `Block.feeding`: rows of zeros are left out, which stand for tokens that chose other experts."""
        return _Routed(statistic)

    def observe(self, needs: Iterable[type[Statistic]]) -> list[Tensor]:
        """See `Block.observe`."""
        outputs = super().observe((_Tokens, *needs))
        counts = {name: state.statistics[_Tokens].count for name, state in self.weights.items()}
        self.tokens = counts if self.tokens is None else self.tokens
        return outputs

    def round_in_place(self) -> None:
        """Changes nothing: the block's other groups need the unquantized experts."""


class _Routed:
    """Passes the rows that are not zero to a statistic."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""
        rows = x.reshape(-1, x.shape[-1])
        routed = rows.any(-1)
        self.statistic.update(rows if bool(routed.all()) else rows[routed])


class _Tokens:
    """The number of rows: a statistic (`block.statistics`)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""
        self.count += x.shape[:-1].numel()

    def merge(self, other: _Tokens) -> None:
        """Add the rows of another one."""
        self.count += other.count

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors: it has none."""
        return 0
