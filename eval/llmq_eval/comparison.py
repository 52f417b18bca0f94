"""Compare models: the loss of each against its base, and which differences are significant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

from llmq.errors import LlmqError
from llmq.report.measured import recovery
from llmq_eval.intervals import LEVEL, Test, holm, paired, unpaired
from llmq_eval.results import Measure, Results

UNTESTED = ("lost", "gained")
"""Parts of 'top1': testing them too would only weaken all tests, because of the correction for multiple tests."""
Key = tuple[str, str, str]
"""Task, metric, protocol."""
Table = Mapping[Key, Sequence[Measure | None]]
"""A measure's row: one for each model."""


@dataclass(frozen=True)
class Contrast:
    """One model against another on one measure, by one protocol and over the same documents or windows.

    first, second: indices into `Comparison.models`. difference: first minus second, in the measure's unit, with its 95
    % interval (not for speeds, which are not paired). p: of the two-sided test, p_adjusted: after Holm's correction
    over its family (all differences to the base, or all between other models). test: 'paired t', 'exact McNemar' or
    'Mann-Whitney'; verdict: 'better', 'worse' (of the first) or 'within noise'.
    """

    task: str
    metric: str
    protocol: str
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
    """One model's number: measure is None if it was not measured; recovery in % of the base (100 is no loss)."""

    measure: Measure | None
    recovery: float | None = None
    to_base: Contrast | None = None


@dataclass(frozen=True)
class Line:
    """One measure of all the models by one protocol: cells in the order of `Comparison.models`.

    number: of the protocol among `Comparison.protocols`, from 1; only: whether it is the measure's only protocol.
    """

    task: str
    metric: str
    unit: str
    higher_is_better: bool | None
    protocol: str
    cells: tuple[Cell, ...]
    number: int
    only: bool

    @property
    def title(self) -> str:
        """'hellaswag acc', 'perplexity:demo [2]': with the protocol's number if the measure has several lines."""
        name = self.task if self.task.partition(":")[0] == self.metric else f"{self.task} {self.metric}"
        return name if self.only else f"{name} [{self.number}]"


@dataclass(frozen=True)
class Point:
    """A model in the plot of size against KL; front: no other model is both smaller and closer to the base."""

    model: int
    bytes: int
    bits_per_weight: float
    kl: float
    low: float | None
    high: float | None
    front: bool


@dataclass(frozen=True)
class Comparison:
    """models: unique names, the base first if it is one of them; base: its index. notes: remarks for the reader."""

    models: tuple[str, ...]
    base: int | None
    results: tuple[Results, ...]
    lines: tuple[Line, ...]
    contrasts: tuple[Contrast, ...]
    pareto: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """All protocols, once each, in the order of the lines."""
        return tuple(dict.fromkeys(line.protocol for line in self.lines))

    def line(self, one: Contrast) -> Line:
        """The line of a difference."""
        return self._by_key[_key(one)]

    @cached_property
    def _by_key(self) -> dict[Key, Line]:
        return {_key(line): line for line in self.lines}


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
                notes.append(f"{one.name} has another base ({other}): it is not compared with {ordered[base].name}")
    elif len(known) > 1:
        notes.append(f"the models have different bases ({', '.join(sorted(known))}): no model is compared with a base")
    else:
        wanted = sorted(known)
        what = f"{wanted[0]} is not among the results" if wanted else "none was given to `llmq eval`"
        notes.append(f"without a base ({what}) there is no recovery")
    keys = list(dict.fromkeys(measure.key for one in ordered for measure in one.measures))
    first = {key[:2]: number for number, key in reversed(list(enumerate(keys)))}
    # Lines of one measure with different protocols are next to each other.
    keys.sort(key=lambda key: first[key[:2]])
    table = {key: [one.find(*key) for one in ordered] for key in keys}
    numbers = {protocol: number for number, protocol in enumerate(dict.fromkeys(key[2] for key in table), 1)}
    for task, metric in first:
        if protocols := _apart(task, metric, table):
            told = ", ".join(f"[{numbers[protocol]}]" for protocol in protocols)
            notes.append(f"{task} {metric} was measured by different protocols, which cannot be compared: {told}")
    contrasts = _contrasts(table, base, of)
    lines = _lines(table, numbers, base, of, contrasts)
    pareto = _pareto(ordered, table, base, of)
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


def _key(one: Line | Contrast) -> Key:
    return one.task, one.metric, one.protocol


def _apart(task: str, metric: str, table: Table) -> list[str]:
    """The protocols of a measure, if not all models were measured by the same ones."""
    rows = {key[2]: row for key, row in table.items() if key[:2] == (task, metric)}
    measured = [any(of) for of in zip(*rows.values(), strict=True)]
    whole = all(cell or not there for row in rows.values() for cell, there in zip(row, measured, strict=True))
    return [] if whole else list(rows)


def _contrasts(table: Table, base: int | None, of: Sequence[str | None]) -> tuple[Contrast, ...]:
    """Every pair that can be tested, with p adjusted within its family. of: each model's base."""
    found = []
    for (task, metric, _), row in table.items():
        if metric in UNTESTED:
            continue
        for i, j in combinations(range(len(row)), 2):
            # The base is the first model of the table, but the second one of a difference (model minus base).
            first, second = (j, i) if i == base else (i, j)
            one, other = row[first], row[second]
            # A divergence names its own base; other measures are compared with the model's base.
            bases = (one and one.base or of[i], other and other.base or of[j])
            if _differ(*bases) and (second == base or task.startswith("divergence")):
                continue
            if one and other:
                made = _contrast(one, other, first, second)
                if made:
                    found.append(made)
    adjusted: dict[int, float] = {}
    for family in (True, False):
        members = [i for i, made in enumerate(found) if (made.second == base) == family]
        values = holm([p for i in members if (p := found[i].p) is not None])
        adjusted |= dict(zip(members, values, strict=True))
    return tuple(
        replace(made, p_adjusted=adjusted[i], verdict=_verdict(made, adjusted[i], table[_key(made)]))
        for i, made in enumerate(found)
    )


def _contrast(one: Measure, other: Measure, first: int, second: int) -> Contrast | None:
    if not one.samples or not other.samples or not all(map(math.isfinite, (*one.samples, *other.samples))):
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
            # The samples are logarithms: their difference is the logarithm of a ratio of perplexities.
            difference, low, high = (other.value * math.expm1(min(x, 700.0)) for x in (difference, low, high))
    assert tested is not None
    return Contrast(*one.key, first, second, difference, low, high, tested.p, None, tested.name, "")


def _verdict(made: Contrast, p: float, row: Sequence[Measure | None]) -> str:
    measure = row[made.first]
    if p >= 1 - LEVEL or not made.difference or measure is None or measure.higher_is_better is None:
        return "within noise"
    return "better" if (made.difference > 0) == measure.higher_is_better else "worse"


def _lines(
    table: Table,
    numbers: Mapping[str, int],
    base: int | None,
    of: Sequence[str | None],
    contrasts: Sequence[Contrast],
) -> tuple[Line, ...]:
    several = Counter(key[:2] for key in table)
    made = []
    for key, row in table.items():
        some = next(measure for measure in row if measure)
        to_base = {c.first: c for c in contrasts if _key(c) == key and c.second == base}
        references = [None if base is None or _differ(of[i], of[base]) else row[base] for i in range(len(row))]
        cells = [
            Cell(m, recovery(m, reference) if m and reference else None, to_base.get(i))
            for i, (m, reference) in enumerate(zip(row, references, strict=True))
        ]
        task, metric, protocol = key
        number, only = numbers[protocol], several[task, metric] == 1
        made.append(Line(task, metric, some.unit, some.higher_is_better, protocol, tuple(cells), number, only))
    return tuple(made)


def _pareto(results: Sequence[Results], table: Table, base: int | None, of: Sequence[str | None]) -> tuple[Point, ...]:
    """The models' sizes and KL from a common base, which is included with a KL of 0.

    Only one protocol of KL is used: the one that most models have.
    """
    known = None if base is None else results[base].model
    rows = [
        row
        for (_, metric, _), row in table.items()
        if metric == "kl" and not any(m and _differ(m.base, known) for m in row)
    ]
    row = max(rows, key=lambda row: sum(map(bool, row)), default=[])
    places: list[tuple[int, Results, float, float | None, float | None]] = []
    bases: dict[int, str | None] = {}
    for index, (one, measure) in enumerate(zip(results, row, strict=False)):
        bases[index] = (measure and measure.base) or of[index]
        if base is not None and _differ(bases[index], of[base]):
            continue
        if measure is not None and math.isfinite(measure.value):
            places.append((index, one, measure.value, measure.low, measure.high))
        elif index == base:
            places.append((index, one, 0.0, 0.0, 0.0))
    if len({bases[index] for index, *_ in places} - {None}) > 1:
        return ()
    return tuple(
        Point(index, one.bytes, one.bits_per_weight, kl, low, high, not _beaten(one.bytes, kl, places))
        for index, one, kl, low, high in places
    )


def _beaten(size: int, kl: float, places: Sequence[tuple[int, Results, float, float | None, float | None]]) -> bool:
    return any(o.bytes <= size and k <= kl and (o.bytes < size or k < kl) for _, o, k, _, _ in places)
