"""From losses and costs to a recipe: the choice of bits, and the recipe that has it as overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmq.allocation.groups import Group
from llmq.allocation.knapsack import Choice, Point, front
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe


@dataclass(frozen=True)
class Bound:
    """A limit on the total of some costs.

    what: in words, with the unit of the costs; costs: of each group's candidates; limit: infinite for none, then the
    least total is wanted; way: the option that changes it, for errors.
    """

    what: str
    costs: Sequence[Sequence[float]]
    limit: float
    way: str


@dataclass(frozen=True)
class Allocation:
    """A candidate for each group. name: of the view of the losses that it is best in; predicted: the sum of its losses,
    in nats; costs: its totals, by bound."""

    picks: tuple[int, ...]
    predicted: float
    costs: tuple[float, ...] = ()
    name: str = ""

    def nbytes(self, groups: Sequence[Group]) -> int:
        """The stored bytes of all weights."""
        return sum(group.nbytes[c] for group, c in zip(groups, self.picks, strict=True))

    def schemes(self, groups: Sequence[Group]) -> list[Scheme | None]:
        """The scheme of each group."""
        return [group.candidates[c] for group, c in zip(groups, self.picks, strict=True)]


def allocate(
    groups: Sequence[Group], losses: Sequence[Sequence[float]], bounds: Sequence[Bound], most: float | None = None
) -> Allocation:
    """The allocation with the least loss within one or two bounds; or, with `most`, the one with the least first cost
    whose predicted loss is at most that, in nats.

    Raises LlmqError with the nearest that can be had.
    """
    points = _front(groups, losses, bounds)
    if not points:
        raise LlmqError(_unmet(groups, bounds))
    if most is None:
        chosen = min(points, key=lambda p: (p.loss, p.costs))
    else:
        within = [point for point in points if point.loss <= most]
        if not within:
            least = min(point.loss for point in points)
            raise LlmqError(
                f"--max-kl {most:g}: the least that the candidates reach is {least:.2g} nats: give more, or "
                "--candidates with more bits"
            )
        chosen = min(within, key=lambda p: (p.costs, p.loss))
    return Allocation(chosen.picks, chosen.loss, chosen.costs)


def check_bounds(groups: Sequence[Group], bounds: Sequence[Bound]) -> None:
    """Raise LlmqError, with the least that can be had, if a bound is below what the cheapest candidates take."""
    if any(sum(min(row) for row in bound.costs) > bound.limit for bound in bounds):
        raise LlmqError(_unmet(groups, bounds))


def curve(groups: Sequence[Group], losses: Sequence[Sequence[float]], points: int = 64) -> list[tuple[float, float]]:
    """(stored bits per weight, predicted loss in nats) of the best allocations for rising sizes, at most so many."""
    numbers = sum(group.numbers for group in groups)
    bound = Bound("stored bytes", [group.nbytes for group in groups], float("inf"), "")
    found = [(8 * p.costs[0] / max(1, numbers), p.loss) for p in _front(groups, losses, [bound])]
    step = max(1, (len(found) - 1) // max(1, points - 1))
    return [*found[:-1:step], found[-1]]


def views(
    groups: Sequence[Group], losses: Sequence[Sequence[float]], linear: Sequence[Sequence[float]]
) -> dict[str, list[list[float]]]:
    """The losses as they were scored, and as they may be in truth, by name.

    Divergences of single groups do not quite add up: with many groups at the fewest bits, the truth is more. linear:
    the losses by the squared errors of the weights, which smooth what few windows make of single groups.
    """
    lowest = [next((c for c, s in enumerate(group.candidates) if s is not None), -1) for group in groups]
    more = [[x * 1.5 if c == low else x for c, x in enumerate(row)] for row, low in zip(losses, lowest, strict=True)]
    found = {"as scored": [list(row) for row in losses], "fewest bits dearer": more}
    return found | {"by the weights' errors": [list(row) for row in linear]}


def recipe_of(recipe: Recipe, groups: Sequence[Group], allocation: Allocation) -> Recipe:
    """The recipe with the chosen scheme of each weight: as overrides by full name, before those that it has.

    The recipe's scheme becomes that of the routed experts, or else of most weights.
    """
    schemes = allocation.schemes(groups)
    count: Counter[Scheme] = Counter()
    for group, scheme in zip(groups, schemes, strict=True):
        if scheme is not None:
            count[scheme] += 10**9 if group.experts else len(group.weights)
    if not count:
        raise LlmqError("the budget holds all weights as they are: there is nothing to quantize")
    base = max(count, key=lambda scheme: (count[scheme], str(scheme)))
    overrides, keep = [], []
    for group, scheme in zip(groups, schemes, strict=True):
        for weight in group.weights:
            if scheme is None:
                keep.append(weight.name)
            elif scheme != base:
                overrides.append((weight.name, scheme))
    return replace(recipe, scheme=base, overrides=(*overrides, *recipe.overrides), keep=(*recipe.keep, *keep))


def _front(groups: Sequence[Group], losses: Sequence[Sequence[float]], bounds: Sequence[Bound]) -> list[Point]:
    tables = [
        [Choice(tuple(bound.costs[g][c] for bound in bounds), losses[g][c]) for c in range(len(group.candidates))]
        for g, group in enumerate(groups)
    ]
    return front(tables, [bound.limit for bound in bounds])


def _unmet(groups: Sequence[Group], bounds: Sequence[Bound]) -> str:
    """Why no allocation is within the bounds."""
    for bound in bounds:
        least = sum(min(row) for row in bound.costs)
        if least > bound.limit:
            asked = f"and {bound.limit:,.6g} are asked for: {bound.way}"
            return f"the least that the candidates have is {least:,.6g} {bound.what}, {asked}"
    told = " and ".join(f"{bound.limit:,.6g} {bound.what}" for bound in bounds)
    return f"no choice of bits is within {told} at once: {'; or '.join(bound.way for bound in bounds)}"
