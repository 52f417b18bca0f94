"""Which expert multiplies which row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which of stacked experts multiplies which row of x.

    Either offs: int32 [E], where the rows of each expert end, of rows that are sorted by expert; rows beyond the last
    belong to none. Or chosen: int [T, choices], the experts of each row of x; the product then has T · choices rows,
    and a number that no expert has chooses none. A row of no expert gives zeros.
    """

    offs: Tensor | None = None
    chosen: Tensor | None = None

    def contiguous(self) -> Routing:
        """The same, in memory one after the other: a slice of a wider choice is not."""
        return Routing(*(None if part is None else part.contiguous() for part in (self.offs, self.chosen)))

    def rows(self, x: Tensor) -> int:
        """Of the product with x [S, in]."""
        return x.shape[0] if self.chosen is None else self.chosen.numel()

    @property
    def kind(self) -> tuple[object, ...]:
        """What launches of kernels depend on, besides addresses and the number of rows."""
        return (self.choices, None if self.chosen is None else self.chosen.dtype)

    @property
    def choices(self) -> int:
        """Rows of the product for each row of x."""
        return 1 if self.chosen is None else self.chosen.shape[1]


def unsorted(tokens: int, choices: int, experts: int) -> bool:
    """Whether to multiply pairs of tokens and experts as they come: where hardly two of them have the same expert.

    A pair reads all of its expert's weights. Of pairs half as many as experts, a fifth are not the first of theirs, if
    they are routed at random.
    """
    return tokens == 1 or 2 * tokens * choices <= experts


def sort(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs of tokens and experts sorted by expert: their numbers, and int32 [experts] where each expert's end."""
    flat = chosen.reshape(-1)
    known = torch.where((flat >= 0) & (flat < experts), flat, experts)
    numbers, order = torch.sort(known, stable=True)
    every = torch.arange(experts, device=flat.device, dtype=flat.dtype)
    return order, torch.searchsorted(numbers, every, right=True, out_int32=True)
