"""Layout of the plots: size against KL, and numbers with their intervals; positions in percent and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmq.machine import size
from llmq.report.measured import digits, interval, value
from llmq.report.page.charts import LOGARITHMIC, Label, decades, free, ticks
from llmq_eval.comparison import Comparison, Line

HEIGHT = 320
"""The height of the Pareto plot's area, in pixels."""
ZERO = 0.12
"""The fraction of a logarithmic axis between 0 and its first tick."""
LABEL = 24
"""The maximum number of letters of a label; the tooltip has the whole name."""
SKIPPED = ("lost", "gained")


@dataclass(frozen=True)
class Mark:
    """A model in the plot. x in percent; y, the label's position and the interval's ends (low, high) in pixels."""

    name: str
    label: str
    x: float
    y: float
    low: float
    high: float
    front: bool
    left: bool
    label_y: float
    text: str


@dataclass(frozen=True)
class Pareto:
    """Size against divergence. line: the Pareto front, from small to large, as (x, y) in percent of the area."""

    description: str
    marks: list[Mark]
    line: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    table: list[list[str]]


@dataclass(frozen=True)
class Dot:
    """A model's number on its own line, in percent of the width; None if it was not measured."""

    name: str
    x: float | None
    low: float | None
    high: float | None
    text: str
    base: bool
    noise: bool


@dataclass(frozen=True)
class Dots:
    """One measure of all models on one axis."""

    id: str
    title: str
    description: str
    first: str
    last: str
    base: float | None
    dots: list[Dot]


def pareto(found: Comparison) -> Pareto | None:
    """The plot of size against KL, or None if fewer than two models have both."""
    points = sorted(found.pareto, key=lambda point: point.bytes)
    if len(points) < 2:
        return None
    unit, word = (2**30, "GiB") if points[-1].bytes >= 2**30 else (2**20, "MiB")
    across = ticks(points[-1].bytes / unit)
    across = across[max(0, sum(tick <= points[0].bytes / unit for tick in across[:-1]) - 1) :]
    positive = [p.kl for p in points if p.kl > 0]
    up = _up(positive)

    def x(nbytes: float) -> float:
        return round(100 * (nbytes / unit - across[0]) / (across[-1] - across[0]), 2)

    def y(kl: float) -> float:
        return round(HEIGHT * (1 - _place(kl, up)), 1)

    marks: list[Mark] = []
    for p in sorted(points, key=lambda p: y(p.kl)):
        name = found.models[p.model] + (" (base)" if p.model == found.base else "")
        label = name if len(name) <= LABEL else f"{name[: LABEL - 1]}…"
        left = x(p.bytes) > 55
        low, high = (p.kl, p.kl) if p.low is None or p.high is None else (p.low, p.high)
        spread = f", {digits(low)} – {digits(high)}" if low < high else ""
        text = f"{name}: {size(p.bytes)}, {p.bits_per_weight:.2f} bits per weight, KL {digits(p.kl)} nats{spread}"
        at = x(p.bytes), y(p.kl)
        taken = [Label(mark.x, mark.label_y, mark.label, mark.left) for mark in marks]
        label_y = free(*at, label, left, taken, HEIGHT).y
        marks.append(Mark(name, label, *at, y(low), y(high), p.front, left, label_y, text))
    inside = [p for p in points if p.front]
    line = " ".join(f"{x(p.bytes):g},{100 * y(p.kl) / HEIGHT:.2f}" for p in inside)
    names = ", ".join(f"{found.models[p.model]} ({size(p.bytes)}, KL {digits(p.kl, 3)})" for p in inside)
    return Pareto(
        f"{len(points)} models by size and by KL divergence from the base. No other is both smaller and closer to the "
        f"base than these: {names}.",
        sorted(marks, key=lambda mark: mark.x),
        line,
        [(x(tick * unit), f"{tick:g} {word}") for tick in across],
        [(y(tick), f"{tick:g}") for tick in (up if up[0] <= 0 else [0.0, *up])],
        [
            [found.models[p.model], size(p.bytes), f"{p.bits_per_weight:.2f}", digits(p.kl), "yes" if p.front else "no"]
            for p in points
        ],
    )


def _up(positive: Sequence[float]) -> list[float]:
    """Ticks of the KL axis: from 0, or at 1, 2, 5 in every decade if the values differ by a large factor."""
    if not positive or max(positive) / min(positive) <= LOGARITHMIC:
        return ticks(max(positive, default=1.0))
    return decades(positive)


def _place(kl: float, up: Sequence[float]) -> float:
    """The position from 0 at the bottom to 1 at the top. On a logarithmic axis the first tick is a little above 0."""
    if up[0] <= 0:
        return kl / up[-1]
    if kl <= 0 or len(up) < 2:
        return 0.0
    place = math.log(max(kl, up[0]) / up[0]) / math.log(up[-1] / up[0])
    return ZERO + (1 - ZERO) * place


def dots(found: Comparison) -> list[Dots]:
    """A plot for each measure of quality with intervals: every model's number on one axis."""
    made: list[Dots] = []
    for line in found.lines:
        there = [cell.measure for cell in line.cells if cell.measure]
        if line.metric in SKIPPED or line.higher_is_better is None or not any(m.low is not None for m in there):
            continue
        if line.metric.startswith("kl_"):
            continue
        ends = [end for m in there for end in (m.value, m.low, m.high) if end is not None and math.isfinite(end)]
        if not ends:
            continue
        low, high = min(ends), max(ends)
        pad = 0.06 * (high - low) or 1.0
        # The axis does not extend to impossible values.
        first = max(0.0, low - pad) if low >= 0 else low - pad
        last = min(1.0, high + pad) if line.unit == "share" and high <= 1 else high + pad
        made.append(_dots(f"dots-{len(made)}", line, found, first, last))
    return made


def _dots(id: str, line: Line, found: Comparison, low: float, high: float) -> Dots:
    def x(number: float | None) -> float | None:
        return None if number is None or not math.isfinite(number) else round(100 * (number - low) / (high - low), 2)

    drawn = []
    for i, (name, cell) in enumerate(zip(found.models, line.cells, strict=True)):
        m = cell.measure
        if m is None and i == found.base and line.task.startswith("divergence"):
            continue
        if m is None:
            drawn.append(Dot(name, None, None, None, "not measured", i == found.base, False))
            continue
        spread = interval(m)
        verdict = f", {cell.to_base.verdict} (against the base)" if cell.to_base else ""
        text = value(m.value, m.unit) + (f", {spread}" if spread else "") + verdict
        noise = cell.to_base is not None and cell.to_base.verdict == "within noise"
        drawn.append(Dot(name, x(m.value), x(m.low), x(m.high), text, i == found.base, noise))
    reference = None if found.base is None else line.cells[found.base].measure
    better = "Higher" if line.higher_is_better else "Lower"
    said = "; ".join(f"{dot.name} {dot.text}" for dot in drawn)
    return Dots(
        id,
        line.title,
        f"{better} is better. {said}.",
        value(low, line.unit),
        value(high, line.unit),
        None if reference is None else x(reference.value),
        drawn,
    )
