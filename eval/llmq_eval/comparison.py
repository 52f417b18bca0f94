"""Models side by side: what each lost against its base, and which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from llmq.errors import LlmqError
from llmq_eval.intervals import LEVEL, Test, holm, paired, unpaired
from llmq_eval.results import Measure, Results

UNTESTED = ("lost", "gained")
"""Parts of what 'top1' says already: more tests of the same would only make every test weaker."""


@dataclass(frozen=True)
class Contrast:
    """One model against another on one measure, over the same documents or windows.

    first, second: indices into `Comparison.models`. difference: first minus second, in the measure's unit, with its
    95 % interval (not for speeds, which come in no pairs). p: of the two-sided test, p_adjusted: after Holm, over its
    family (all differences to the base, or all between the others). test: 'paired t', 'exact McNemar' or
    'Mann-Whitney'; verdict: 'better', 'worse' (of the first) or 'within noise'.
    """

    task: str
    metric: str
    first: int
    second: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    test: str
    verdict: str


@dataclass(frozen=True)
class Cell:
    """One model's number: measure is None where it was not measured; recovery in % of the base (100 is no loss)."""

    measure: Measure | None
    recovery: float | None = None
    to_base: Contrast | None = None


@dataclass(frozen=True)
class Line:
    """One measure of all the models: cells in the order of `Comparison.models`."""

    task: str
    metric: str
    unit: str
    higher_is_better: bool | None
    protocol: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Point:
    """A model in the plane of size and damage; front: no other is both smaller and closer to the base."""

    model: int
    bytes: int
    bits_per_weight: float
    kl: float
    low: float | None
    high: float | None
    front: bool


@dataclass(frozen=True)
class Comparison:
    """models: names, unique, the base first where it is among them; base: its index. notes: what a reader must know."""

    models: tuple[str, ...]
    base: int | None
    results: tuple[Results, ...]
    lines: tuple[Line, ...]
    contrasts: tuple[Contrast, ...]
    pareto: tuple[Point, ...]
    notes: tuple[str, ...]


def comparison(results: Sequence[Results]) -> Comparison:
    """Compare models that were measured by the same protocols. Raises LlmqError if there is nothing to compare."""
    if not results:
        raise LlmqError("no results to compare: run `llmq eval` first")
    known = {one.base for one in results if one.base}
    bases = known & {one.model for one in results}
    ordered = sorted(results, key=lambda one: one.model not in bases)
    base = 0 if len(bases) == 1 else None
    notes = []
    of = [one.base for one in ordered]
    if base is not None:
        of[base] = ordered[base].model
        for one, other in zip(ordered, of, strict=True):
            if _differ(other, of[base]):
                notes.append(f"{one.name} has another base ({other}): it is not related to {ordered[base].name}")
    elif len(known) > 1:
        notes.append(f"the models have different bases ({', '.join(sorted(known))}): nothing is related to a base")
    else:
        wanted = sorted(known)
        what = f"{wanted[0]} is not among the results" if wanted else "none was given to `llmq eval`"
        notes.append(f"without a base ({what}) there is no recovery")
    keys = list(dict.fromkeys(measure.key for one in ordered for measure in one.measures))
    table = {key: [one.find(*key) for one in ordered] for key in keys}
    for (task, metric), row in table.items():
        protocols = {measure.protocol for measure in row if measure}
        if len(protocols) > 1:
            notes.append(
                f"{task} {metric} was measured by different protocols, which cannot be compared: {_list(protocols)}"
            )
    contrasts = _contrasts(table, base, of)
    lines = tuple(_line(key, row, base, of, contrasts) for key, row in table.items())
    pareto = _pareto(ordered, base, of)
    return Comparison(_names(ordered), base, tuple(ordered), lines, contrasts, pareto, tuple(dict.fromkeys(notes)))


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two models are known to have different bases."""
    return one is not None and other is not None and one != other


def _names(results: Sequence[Results]) -> tuple[str, ...]:
    """Short names where they are unique, else with the folder above, else with the fingerprint."""
    for name in (
        lambda one: one.name,
        lambda one: "/".join(Path(one.model).parts[-2:]),
        lambda one: f"{one.name}-{one.fingerprint}",
    ):
        names = tuple(name(one) for one in results)
        if len(set(names)) == len(names):
            return names
    return tuple(f"{number}. {one.name}" for number, one in enumerate(results, 1))


def _list(protocols: set[str]) -> str:
    return " / ".join(sorted(protocols))


def _contrasts(
    table: dict[tuple[str, str], list[Measure | None]], base: int | None, of: Sequence[str | None]
) -> tuple[Contrast, ...]:
    """Every pair that can be tested, with p adjusted within its family. of: each model's base."""
    found = []
    for (task, metric), row in table.items():
        if metric in UNTESTED:
            continue
        for i, j in combinations(range(len(row)), 2):
            # The base comes first in the table and second in a difference, which is what a model lost.
            first, second = (j, i) if i == base else (i, j)
            one, other = row[first], row[second]
            if _differ(of[i], of[j]) and (second == base or task.startswith("divergence")):
                continue
            if one and other and one.protocol == other.protocol:
                made = _contrast(one, other, first, second)
                if made:
                    found.append(made)
    adjusted: dict[int, float] = {}
    for family in (True, False):
        members = [i for i, made in enumerate(found) if (made.second == base) == family]
        values = holm([p for i in members if (p := found[i].p) is not None])
        adjusted |= dict(zip(members, values, strict=True))
    return tuple(
        replace(made, p_adjusted=adjusted[i], verdict=_verdict(made, adjusted[i], table[made.task, made.metric]))
        for i, made in enumerate(found)
    )


def _contrast(one: Measure, other: Measure, first: int, second: int) -> Contrast | None:
    if not one.samples or not other.samples:
        return None
    if one.task == "speed":
        difference, low, high = one.value - other.value, None, None
        tested: Test | None = unpaired(one.samples, other.samples)
    else:
        if len(one.samples) != len(other.samples):
            return None
        tested = paired(one.samples, other.samples)
        if tested is None:
            return None
        difference, low, high = tested.difference, tested.low, tested.high
        if one.metric == "perplexity":
            # The samples are logarithms: a difference of theirs is a ratio of perplexities.
            difference, low, high = (other.value * math.expm1(min(x, 700.0)) for x in (difference, low, high))
    assert tested is not None
    return Contrast(one.task, one.metric, first, second, difference, low, high, tested.p, None, tested.name, "")


def _verdict(made: Contrast, p: float, row: Sequence[Measure | None]) -> str:
    measure = row[made.first]
    if p >= 1 - LEVEL or not made.difference or measure is None or measure.higher_is_better is None:
        return "within noise"
    return "better" if (made.difference > 0) == measure.higher_is_better else "worse"


def _line(
    key: tuple[str, str],
    row: Sequence[Measure | None],
    base: int | None,
    of: Sequence[str | None],
    contrasts: Sequence[Contrast],
) -> Line:
    some = next(measure for measure in row if measure)
    to_base = {c.first: c for c in contrasts if (c.task, c.metric) == key and c.second == base}
    references = [None if base is None or _differ(other, of[base]) else row[base] for other in of]
    cells = tuple(Cell(m, _recovery(m, references[i]), to_base.get(i)) for i, m in enumerate(row))
    return Line(*key, some.unit, some.higher_is_better, some.protocol, cells)


def _recovery(measure: Measure | None, reference: Measure | None) -> float | None:
    """How much of the base's quality is left, in %; None for what is no quality, or was measured otherwise."""
    if not measure or not reference or measure.protocol != reference.protocol or measure.higher_is_better is None:
        return None
    if measure.task.partition(":")[0] in ("speed", "memory", "divergence"):
        return None
    over, under = (measure, reference) if measure.higher_is_better else (reference, measure)
    return 100 * over.value / under.value if under.value else None


def _pareto(results: Sequence[Results], base: int | None, of: Sequence[str | None]) -> tuple[Point, ...]:
    """The models in the plane of size and KL, which is from one base; that is there with a KL of 0."""
    task = next((m.task for one in results for m in one.measures if m.metric == "kl"), "")
    places: list[tuple[int, Results, float, float | None, float | None]] = []
    for index, one in enumerate(results):
        measure = one.find(task, "kl")
        if base is not None and _differ(of[index], of[base]):
            continue
        if measure is not None:
            places.append((index, one, measure.value, measure.low, measure.high))
        elif index == base and task:
            places.append((index, one, 0.0, 0.0, 0.0))
    if len({of[index] for index, *_ in places} - {None}) > 1:
        return ()
    return tuple(
        Point(index, one.bytes, one.bits_per_weight, kl, low, high, not _beaten(one.bytes, kl, places))
        for index, one, kl, low, high in places
    )


def _beaten(size: int, kl: float, places: Sequence[tuple[int, Results, float, float | None, float | None]]) -> bool:
    return any(o.bytes <= size and k <= kl and (o.bytes < size or k < kl) for _, o, k, _, _ in places)
