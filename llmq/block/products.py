"""Sums of products over tokens, [rows, width], which are added to a part of the rows at a time.

Where several ranks sum, one adds to a part while the next adds to the part before (`ranks.relay`); a single process
takes the same parts, so that its products have the same bytes.
"""

from __future__ import annotations

from torch import Tensor

PARTS = 4
LEAST = 256
"""The rows of a part, at least: fewer take longer to multiply."""


def parts(total: Tensor) -> list[tuple[Tensor, slice]]:
    """The parts of a sum [rows, width], views of it, and which rows they are."""
    rows = len(total)
    step = max(LEAST, -(-rows // PARTS))
    return [(total[start : start + step], slice(start, min(rows, start + step))) for start in range(0, rows, step)]
