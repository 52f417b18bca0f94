"""Models side by side: what each lost against its base, and which differences are more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmq_eval.results import Measure, Results


@dataclass(frozen=True)
class Contrast:
    """One model against another on one measure, over the same documents or windows.

    first, second: indices into `Comparison.models`. difference: first minus second, in the measure's unit, with its
    95 % interval. p: of the two-sided paired test, p_adjusted: after Holm, over its family (all differences to the base,
    or all between the others). test: 'paired t', 'exact McNemar' …; verdict: 'better' or 'worse' (of the first),
    'within noise', or 'no test: why'.
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
    raise NotImplementedError
