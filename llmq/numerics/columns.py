"""Column by column: later columns of a block are changed for what was done to earlier ones."""

from __future__ import annotations

from torch import Tensor

INNER = 32
"""Columns that are updated one by one; the others for this many at once, while the block passes the cache once."""


def compensate(block: Tensor, coefficients: Tensor, changes: Tensor, column: int) -> None:
    """Subtract cᵀδ of a column from those behind it in its part of a block; behind the part's last column, that of the
    whole part from all others of the block.

    block: [columns, out], changed in place; coefficients c: [columns, columns]; changes δ: [columns, out], known up to
    this column.
    """
    first = column // INNER * INNER
    stop = min(first + INNER, len(block))
    if column + 1 < stop:
        block[column + 1 : stop].addr_(coefficients[column, column + 1 : stop], changes[column], alpha=-1)
    elif stop < len(block):
        block[stop:].addmm_(coefficients[first:stop, stop:].t(), changes[first:stop], alpha=-1)
