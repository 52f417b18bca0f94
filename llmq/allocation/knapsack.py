"""The multiple-choice knapsack: one choice for each group, with the least total loss within one or two budgets.

Exact, by dynamic programming over non-dominated partial sums (Nemhauser & Ullmann 1969): after each group, a partial
sum stays if no other is at least as good in all costs and in loss. Costs may be bytes, milliseconds, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST = 100_000
"""Partial sums that are kept, at most. Above it, costs are rounded up to a grid: budgets still hold, and the result is
the best of the rounded problem."""


@dataclass(frozen=True)
class Choice:
    """One way to store a group: its costs, one or two numbers ≥ 0, and its loss."""

    costs: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Point:
    """A choice for each group, by index; and their exact total costs and loss."""

    picks: tuple[int, ...]
    costs: tuple[float, ...]
    loss: float


def front(groups: Sequence[Sequence[Choice]], limits: Sequence[float]) -> list[Point]:
    """All selections within the limits that no other one beats in every cost and in loss, by rising first cost.

    limits: of each cost's total; infinite where there is none. Empty if no selection is within them. Raises ValueError
    for negative or missing numbers.
    """
    count = len(limits)
    tables = [
        (np.array([c.costs for c in g], float).reshape(len(g), count), np.array([c.loss for c in g])) for g in groups
    ]
    for costs, losses in tables:
        if not len(losses) or not np.isfinite(losses).all() or not (np.isfinite(costs) & (costs >= 0)).all():
            raise ValueError("a group needs a choice, and every choice finite costs ≥ 0 and a finite loss")
    # What the groups after this one cost at least.
    rest = np.zeros((len(tables) + 1, count))
    for i in range(len(tables) - 1, -1, -1):
        rest[i] = rest[i + 1] + tables[i][0].min(0)
    sums, losses = np.zeros((1, count)), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    slack = 1e-9 * (1 + np.abs(np.where(np.isfinite(limits), limits, 0)))
    for i, (costs, loss) in enumerate(tables):
        total = (sums[:, None] + costs[None]).reshape(-1, count)
        worth = (losses[:, None] + loss[None]).reshape(-1)
        came = np.repeat(np.arange(len(losses)), len(loss))
        pick = np.tile(np.arange(len(loss)), len(losses))
        within = (total + rest[i + 1] <= np.asarray(limits) + slack).all(1)
        total, worth, came, pick = total[within], worth[within], came[within], pick[within]
        if not len(worth):
            return []
        kept = _undominated(total, worth)
        if len(kept) > MOST:
            kept = _undominated(_rounded_up(total, MOST), worth)
        sums, losses = total[kept], worth[kept]
        trail.append((came[kept], pick[kept]))
    return sorted((_traced(tables, trail, end) for end in range(len(losses))), key=lambda p: (p.costs, p.loss))


def best(groups: Sequence[Sequence[Choice]], limits: Sequence[float]) -> Point | None:
    """The selection with the least loss within the limits, of equals the cheapest; None if there is none."""
    return min(front(groups, limits), key=lambda p: (p.loss, p.costs), default=None)


def _undominated(costs: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices of the rows that no other row beats or equals in everything; of equal rows, one."""
    if costs.shape[1] == 1:
        order = np.lexsort((loss, costs[:, 0]))
        lowest = np.minimum.accumulate(loss[order])
        before = np.concatenate([[np.inf], lowest[:-1]])
        return order[loss[order] < before]
    order = np.lexsort((loss, costs[:, 1], costs[:, 0]))
    # A staircase of the second cost and the least loss among rows that are no dearer in the first.
    ranks = np.unique(costs[:, 1], return_inverse=True)[1] + 1
    tree = np.full(int(ranks.max()) + 1, np.inf)
    kept = []
    for row in order:
        place, least = int(ranks[row]), np.inf
        while place > 0:
            least = min(least, tree[place])
            place -= place & -place
        if loss[row] < least:
            kept.append(row)
            place = int(ranks[row])
            while place < len(tree):
                tree[place] = min(tree[place], loss[row])
                place += place & -place
    return np.array(kept, np.int64)


def _rounded_up(costs: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Costs on a grid with so few values that about `most` rows stay undominated."""
    steps = most if costs.shape[1] == 1 else int(most**0.5)
    low, high = costs.min(0), costs.max(0)
    unit = np.where(high > low, (high - low) / steps, 1.0)
    return np.asarray(low + np.ceil((costs - low) / unit) * unit)


def _traced(
    tables: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    trail: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    end: int,
) -> Point:
    picks = []
    for came, pick in reversed(trail):
        picks.append(int(pick[end]))
        end = int(came[end])
    picks.reverse()
    chosen = [(costs[p], loss[p]) for (costs, loss), p in zip(tables, picks, strict=True)]
    costs = sum((c for c, _ in chosen), np.zeros(tables[0][0].shape[1] if tables else 0))
    return Point(tuple(picks), tuple(map(float, costs)), float(sum(one for _, one in chosen)))
