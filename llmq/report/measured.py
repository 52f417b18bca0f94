"""Measurements as the page and the model card show them, each beside the base model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

NO_QUALITY = ("divergence", "speed", "memory")


class Measure(Protocol):
    """One number of one model. low, high: its 95 % interval; higher_is_better: None if neither direction is better."""

    @property
    def task(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def higher_is_better(self) -> bool | None: ...
    @property
    def protocol(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """A row of the table of measurements, as text. recovery: in % of the base, '' if not applicable.

    number: of the protocol, from 1; if a measure has several protocols, task ends with it, as in 'perplexity:demo [2]'.
    """

    task: str
    metric: str
    value: str
    interval: str
    base: str
    recovery: str
    protocol: str
    number: int


def rows(measures: Iterable[Measure], base: Iterable[Measure] = ()) -> list[Row]:
    """A row for each measure, beside the base's value for the same task, metric and protocol."""
    found = {(m.task, m.metric, m.protocol): m for m in base}
    measures = list(measures)
    numbers = {protocol: number for number, protocol in enumerate(dict.fromkeys(m.protocol for m in measures), 1)}
    several = Counter((m.task, m.metric) for m in measures)
    made = []
    for m in measures:
        other = found.get((m.task, m.metric, m.protocol))
        recovered = None if other is None else recovery(m, other)
        made.append(
            Row(
                m.task if several[m.task, m.metric] == 1 else f"{m.task} [{numbers[m.protocol]}]",
                m.metric,
                value(m.value, m.unit),
                interval(m),
                "" if other is None else value(other.value, m.unit),
                "" if recovered is None else f"{recovered:.1f} %",
                m.protocol,
                numbers[m.protocol],
            )
        )
    return made


def recovery(measure: Measure, base: Measure) -> float | None:
    """The share of the base's quality that is kept, in %: the ratio, inverted if lower is better; or None.

    None for measures other than quality (a speed, a size), measures relative to the base (a divergence), different
    protocols, values that are not positive, and sums of logarithms.
    """
    if measure.higher_is_better is None or measure.task.partition(":")[0] in NO_QUALITY:
        return None
    over, under = (measure, base) if measure.higher_is_better else (base, measure)
    if measure.protocol != base.protocol or not (over.value >= 0 and under.value > 0):
        return None
    return 100 * over.value / under.value


def value(number: float, unit: str = "") -> str:
    """A number with its unit, formatted for people: bytes as MiB, a fraction as %, else four significant digits."""
    from llmq.machine import size

    if number != number:
        return "not a number"
    if unit in ("bytes", "B"):
        return size(number)
    if unit in ("share", "fraction"):
        return f"{100 * number:.2f} %"
    return f"{digits(number)} {unit}".strip()


def interval(measure: Measure) -> str:
    """The 95 % interval, or '' if there is none."""
    if measure.low is None or measure.high is None:
        return ""
    low, high = value(measure.low, measure.unit), value(measure.high, measure.unit)
    unit = f" {low.rpartition(' ')[2]}" if " " in low else ""
    return f"{low.removesuffix(unit)} – {high}" if unit and high.endswith(unit) else f"{low} – {high}"


def digits(number: float, significant: int = 4) -> str:
    """A number with this many significant digits, without an exponent if short: 0.01234, 12.34, 1,234."""
    if number == 0:
        return "0"
    if abs(number) >= 10**significant:
        return f"{number:,.0f}"
    if abs(number) < 1e-4:
        return f"{number:.{significant - 1}e}"
    return f"{number:#.{significant}g}".rstrip(".")
