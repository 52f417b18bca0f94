"""Sums RᵀR of which only one of two equal entries is computed while rows are added."""

from __future__ import annotations

from torch import Tensor

STRIP = 512
"""The rows of a sum that are computed at once: up to the diagonal."""


def add_gram(total: Tensor, rows: Tensor, part: slice) -> None:
    """Add to some rows of RᵀR, up to the diagonal, and something to some of what is above.

    total: float32 [part, n], the sum's rows of `part`; rows: R [rows, n].
    """
    for start in range(part.start, part.stop, STRIP):
        stop = min(start + STRIP, part.stop)
        strip = total[start - part.start : stop - part.start, :stop]
        strip.addmm_(rows[:, start:stop].t(), rows[:, :stop])


def mirror(total: Tensor) -> None:
    """Replace what is above the diagonal of a matrix by what is below."""
    for start in range(0, len(total), STRIP):
        stop = min(start + STRIP, len(total))
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        total[start:stop, stop:] = total[stop:, start:stop].t()
