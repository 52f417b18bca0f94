"""Data of the charts for the templates: all positions are computed, in percent of the plot's width or height."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

LEVELS = 9
"""Colours of the heat map's scale."""
LOGARITHMIC = 3.0
"""From this ratio of the largest to the smallest value on, a scale is logarithmic."""
TICKS = 4
WIDTH, HEIGHT = 1000, 100
"""Of a strip of points, in the units of its SVG."""
NARROW = 250
"""The width of a plot's area on a phone, in pixels: labels that do not overlap there do not overlap on any screen."""
LETTER = 6.8
"""The width of a letter of a label, in pixels."""
MANY_TICKS = 7


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map. level: 0 … LEVELS − 1, None if the weight is not quantized; text: its tooltip."""

    at: int
    level: int | None
    text: str
    number: str


@dataclass(frozen=True)
class Strip:
    """A row of a heat map: one kind of weight in all blocks."""

    label: str
    detail: str
    cells: list[Cell]


@dataclass(frozen=True)
class Heat:
    """A heat map. columns: their names; steps: (level, from, to) of the colour scale.

    key: (level, text) of single colours, None for weights that are not quantized, instead of steps; said: what a
    strip shows, with the number of its cells.
    """

    id: str
    title: str
    description: str
    columns: list[str]
    strips: list[Strip]
    steps: list[tuple[int, str, str]]
    key: list[tuple[int | None, str]] = field(default_factory=list)
    said: str = "Its error in each of {} blocks"

    @property
    def left(self) -> bool:
        """Whether some cell is of a weight that is not quantized."""
        return any(cell.level is None for strip in self.strips for cell in strip.cells)

    @property
    def rows(self) -> list[list[str]]:
        """The same data as a table: a row for each block, a column for each strip."""
        found = [{cell.at: cell.number for cell in strip.cells} for strip in self.strips]
        return [[label, *(cells.get(at, "") for cells in found)] for at, label in enumerate(self.columns)]


@dataclass(frozen=True)
class Series:
    """A line or a row of bars. parts: polylines, one for each run of consecutive known values."""

    name: str
    style: str
    parts: list[str]
    dots: list[tuple[float, float]]
    bars: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Plot:
    """Values along an axis of blocks. ticks: (percent from the top, text); columns: (left, width, tooltip) in percent.

    table: a heading and the texts of each column, for readers who cannot see the picture.
    """

    id: str
    title: str
    description: str
    series: list[Series]
    ticks: list[tuple[float, str]]
    columns: list[tuple[float, float, str]]
    first: str
    last: str
    headings: list[str]
    table: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Cloud:
    """A strip of points in a box of WIDTH by HEIGHT. dots, marked: SVG paths of the plain and of the marked points."""

    label: str
    detail: str
    text: str
    dots: str
    marked: str


@dataclass(frozen=True)
class Clouds:
    """Strips of points with common axes. ticks: (percent from the left, text); low, high: texts of the strips' edges.

    headings, table: as in Plot.
    """

    id: str
    title: str
    description: str
    strips: list[Cloud]
    ticks: list[tuple[float, str]]
    low: str
    high: str
    headings: list[str]
    table: list[list[str]]


@dataclass(frozen=True)
class Given:
    """The numbers of a series: style is 'line', 'before', 'bars' …, a class of the style sheet."""

    name: str
    style: str
    values: Sequence[float | None]
    bars: bool = False


@dataclass(frozen=True)
class Label:
    """A point's name beside it. x: of the point, in percent; y: of the text, in pixels; left: whether it ends there."""

    x: float
    y: float
    text: str
    left: bool

    @property
    def ends(self) -> tuple[float, float]:
        """Where it begins and ends on the narrowest screen, in pixels."""
        at, width = self.x / 100 * NARROW, LETTER * len(self.text) + 12
        return (at - width, at) if self.left else (at, at + width)


@dataclass
class Scale:
    """Steps of a colour scale over some values: linear, or logarithmic if they differ by a large factor."""

    values: Sequence[float]
    low: float = field(init=False)
    high: float = field(init=False)
    log: bool = field(init=False)

    def __post_init__(self) -> None:
        positive = [v for v in self.values if v > 0 and math.isfinite(v)]
        self.low, self.high = min(positive, default=0.0), max(positive, default=1.0)
        self.log = self.low > 0 and self.high / self.low > LOGARITHMIC

    def level(self, value: float) -> int:
        """The step of a value."""
        if self.high <= self.low or value <= self.low:
            return 0
        if not math.isfinite(value):
            return LEVELS - 1
        place = (value - self.low) / (self.high - self.low)
        if self.log:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        return min(LEVELS - 1, int(place * LEVELS))

    def edges(self) -> list[float]:
        """The LEVELS + 1 values between the steps."""
        places = [i / LEVELS for i in range(LEVELS + 1)]
        if self.log:
            return [self.low * (self.high / self.low) ** place for place in places]
        return [self.low + (self.high - self.low) * place for place in places]


def ticks(top: float) -> list[float]:
    """0 and a few round numbers up to the first that is not below `top`."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    rough = top / TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def decades(values: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis: at 1, 2 and 5 of every decade that has values, which are above 0.

    Of many, those between the first and the last are at 1 only.
    """
    least, most = min(values), max(values)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    marks = [float(f"{m}e{e}") for e in range(low, high + 1) for m in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= least)
    last = min(i for i, mark in enumerate(marks) if mark >= most)
    marks = marks[first : last + 1]
    if len(marks) <= MANY_TICKS:
        return marks
    return [mark for mark in marks if f"{mark:e}"[0] == "1" or mark in (marks[0], marks[-1])]


def free(x: float, y: float, text: str, left: bool, taken: Sequence[Label], height: int) -> Label:
    """A label near its point, x in percent and y in pixels, without overlap of others on the narrowest screen."""
    usual = Label(x, y + 4, text, left)
    begin, end = usual.ends
    near = [other.y for other in taken if other.ends[0] < end and begin < other.ends[1]]
    tries = sorted((usual.y + step for step in range(-height, height + 1, 2)), key=lambda place: abs(place - usual.y))
    inside = [place for place in tries if 10 <= place <= height - 4]
    return Label(x, next((p for p in inside if all(abs(p - other) >= 14 for other in near)), usual.y), text, left)


def dots(points: Iterable[tuple[float, float]]) -> str:
    """An SVG path of the points (shares, from 0 to 1, of the width from the left and of the height from below)."""
    places = ((round(WIDTH * x), round(HEIGHT * (1 - y))) for x, y in points)
    return "".join(f"M{x} {y}h0" for x, y in dict.fromkeys(places))


def plot(
    id: str,
    title: str,
    description: str,
    labels: Sequence[str],
    given: Sequence[Given],
    text: Callable[[float], str],
    *,
    tick: Callable[[float], str] | None = None,
    column: str = "block",
    caption: str = "",
) -> Plot:
    """A plot of some series over the same blocks. text: formats a value; tick: formats it for the axis."""
    values = [v for one in given for v in one.values if v is not None and math.isfinite(v)]
    marks = ticks(max(values, default=1.0))
    top, width = marks[-1], 100 / max(1, len(labels))

    def height(value: float) -> float:
        return round(100 * (1 - value / top), 2)

    columns, table = [], []
    for i, label in enumerate(labels):
        said = ["" if (v := one.values[i]) is None else text(v) for one in given]
        parts = [f"{one.name} {words}" for one, words in zip(given, said, strict=True) if words]
        columns.append((round(i * width, 3), round(width, 3), f"{label}: {', '.join(parts) or 'not known'}"))
        table.append([label, *said])
    drawn = []
    for one in given:
        points = [
            (round((i + 0.5) * width, 3), height(v)) if v is not None and math.isfinite(v) else None
            for i, v in enumerate(one.values)
        ]
        there = [p for p in points if p is not None]
        runs = [[p for p in run if p] for known, run in groupby(points, key=lambda p: p is not None) if known]
        lines = [" ".join(f"{x:g},{y:g}" for x, y in run) for run in runs]
        bars = [(round(x - 0.36 * width, 3), y, round(0.72 * width, 3)) for x, y in there] if one.bars else []
        drawn.append(Series(one.name, one.style, [] if one.bars else lines, [] if one.bars else there, bars))
    return Plot(
        id,
        title,
        description,
        drawn,
        [(height(mark), (tick or text)(mark)) for mark in marks],
        columns,
        labels[0] if labels else "",
        labels[-1] if len(labels) > 1 else "",
        [column, *(one.name for one in given)],
        table,
        caption,
    )
