"""The knapsack against all selections, one by one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from llmq.allocation import knapsack
from llmq.allocation.knapsack import Choice, Point, best, front


def every(groups: list[list[Choice]]) -> list[Point]:
    found = []
    for picks in itertools.product(*(range(len(g)) for g in groups)):
        chosen = [g[p] for g, p in zip(groups, picks, strict=True)]
        costs = tuple(float(sum(c.costs[k] for c in chosen)) for k in range(len(chosen[0].costs)))
        found.append(Point(picks, costs, sum(c.loss for c in chosen)))
    return found


def undominated(points: list[Point]) -> set[tuple[float, ...]]:
    """What no other beats, as (costs …, loss), rounded against the order of sums."""
    rows = {tuple(round(v, 6) for v in (*p.costs, p.loss)) for p in points}
    return {r for r in rows if not any(o != r and all(a <= b for a, b in zip(o, r, strict=True)) for o in rows)}


def draw(rng: random.Random, costs: int) -> list[list[Choice]]:
    # Few different values, so that ties are common.
    def number() -> float:
        return rng.choice((rng.randint(0, 6), rng.randint(0, 6), round(rng.random() * 5, 2)))

    return [
        [Choice(tuple(number() for _ in range(costs)), number()) for _ in range(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 5))
    ]


@pytest.mark.parametrize("costs", [1, 2])
def test_it_finds_what_trying_all_finds(costs: int) -> None:
    rng, met = random.Random(costs), 0
    for _ in range(300):
        groups = draw(rng, costs)
        points = every(groups)
        limits = [rng.choice((math.inf, rng.choice(points).costs[k], rng.random() * 20)) for k in range(costs)]
        within = [p for p in points if all(c <= limit + 1e-9 for c, limit in zip(p.costs, limits, strict=True))]
        found = front(groups, limits)
        assert undominated(found) == undominated(within)
        assert len(found) == len(undominated(found))
        assert [p.costs[0] for p in found] == sorted(p.costs[0] for p in found)
        one = best(groups, limits)
        if within:
            met += 1
            assert one is not None and one.loss == pytest.approx(min(p.loss for p in within))
            assert one in within or any(one.picks == p.picks for p in within)
        else:
            assert one is None
    assert met > 100


@pytest.mark.parametrize("costs", [1, 2])
def test_too_many_sums_are_rounded_within_the_budget(monkeypatch: pytest.MonkeyPatch, costs: int) -> None:
    rng = random.Random(0)
    groups = [
        [Choice(tuple(b + rng.random() for _ in range(costs)), rng.random() * 4.0**-b) for b in (2, 3, 4, 8)]
        for _ in range(12)
    ]
    limits = [40.0] * costs
    exact = best(groups, limits)
    monkeypatch.setattr(knapsack, "MOST", 400)
    coarse = best(groups, limits)
    assert exact is not None and coarse is not None
    assert all(cost <= 40.0 for cost in coarse.costs)
    assert exact.loss <= coarse.loss <= 1.5 * exact.loss


def test_what_is_no_number_is_refused() -> None:
    for wrong in ([], [Choice((-1.0,), 0.0)], [Choice((1.0,), math.nan)], [Choice((math.inf,), 0.0)]):
        with pytest.raises(ValueError, match="finite"):
            front([wrong], [1.0])


def test_no_groups_cost_nothing() -> None:
    assert best([], [1.0]) == Point((), (), 0.0)
