"""Sums RᵀR of which only one of two equal entries is computed while rows are added."""

from __future__ import annotations

from torch import Tensor

STRIP = 512
"""The columns that are computed at once: from the diagonal on downwards."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add RᵀR to the lower triangle of `total` [n, n], and something to some of what is above; rows: [rows, n]."""
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[start:, strip].addmm_(rows[:, start:].t(), rows[:, strip])


def mirror(total: Tensor) -> None:
    """Replace what is above the diagonal of a matrix by what is below."""
    for start in range(0, len(total), STRIP):
        stop = min(start + STRIP, len(total))
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        total[start:stop, stop:] = total[stop:, start:stop].t()
