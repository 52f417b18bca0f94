"""The bits that a run chose: a map of every weight's, the curve of size against divergence, and what was compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmq.machine import size
from llmq.report.bits import BitsRow
from llmq.report.measured import digits
from llmq.report.page.charts import LEVELS, Cell, Heat, Label, Strip, decades, free
from llmq.report.page.figures import NUMBER, Row, kinds_of, labels_of, order_of
from llmq.report.report import Report
from llmq.report.rows import WeightRow

HEIGHT = 300
"""The height of the curve's area, in pixels."""
LABEL = 24
"""The maximum number of letters of a label; the tooltip has the whole name."""
KEY = {
    "front": "the best choices of bits, predicted",
    "": "one scheme for all weights, predicted",
    "on": "the choice that is used, predicted",
    "truth": "the same, measured",
}


@dataclass(frozen=True)
class Mark:
    """A point of the curve's plot. x in percent, y in pixels; style: a key of KEY; label_y: of its name, left: on which
    side of the point that is; text: its tooltip."""

    label: str
    style: str
    x: float
    y: float
    left: bool
    label_y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """Stored bits per weight against divergence, on a logarithmic axis. line: the best choices, (x, y) in percent of
    the area; key: (style, meaning) of what is drawn; headings, table: as in Plot."""

    description: str
    line: str
    marks: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    key: list[tuple[str, str]]
    headings: list[str]
    table: list[list[str]]


@dataclass(frozen=True)
class Bits:
    """All that the page says of the choice of bits.

    told: sentences; tried: the rows of a table with these headings, the chosen one first; lines: what the memory is
    made of; map: of the blocks' weights, outside: of the others, table: all of the others.
    """

    told: list[str]
    headings: list[str]
    tried: list[list[str]]
    lines: list[list[str]]
    map: Heat | None
    outside: Heat | None
    table: list[list[str]]
    curve: Curve | None


def bits(report: Report) -> Bits | None:
    """The section on the choice of bits; None where every weight's scheme was given."""
    row = report.chosen
    if row is None:
        return None
    told = [f"{text[0].upper()}{text[1:]}." for text in (str(row), row.beside) if text]
    told.append(f"Divergences of single groups by the score {row.score!r}, in {digits(row.seconds, 3)} seconds.")
    headings = ["choice", "stored bits", "predicted", "measured"]
    tried = [[one.name, f"{one.bits:.2f}", _nats(one.predicted), _nats(one.truth)] for one in row.tried]
    if row.written is not None:
        headings.append("as written")
        tried = [[*cells, "" if i else _nats(row.written)] for i, cells in enumerate(tried)]
    lines = [[what, size(number)] for what, number in row.lines]
    outside = [one for one in report.weights if one.block is None]
    table = [[one.name, f"{_stored([one]):.2f}", _scheme(one)] for one in outside]
    return Bits(told, headings, tried, lines, inside_map(report), outside_map(report, outside), table, curve(row))


def inside_map(report: Report) -> Heat | None:
    """Stored bits per weight: a column for each block, a strip for each kind of weight; None without blocks.

    Unlike the map of errors, it has the kinds of which no weight is quantized, too.
    """
    rows = [(row, row.block) for row in report.weights if row.block is not None]
    if not rows:
        return None
    kinds, levels = kinds_of(report, rows), _levels(report)
    cells: dict[str, dict[int, list[Row]]] = {}
    for (row, at), kind in zip(rows, kinds, strict=True):
        cells.setdefault(kind, {}).setdefault(at, []).append(row)
    order = order_of(rows, kinds)
    strips = []
    for kind, places in sorted(cells.items(), key=lambda item: order.get(item[0], math.inf)):
        drawn = [_cell(at, f"block {at}, {kind}", alike, levels) for at, alike in sorted(places.items())]
        strips.append(Strip(kind, _detail(places.values()), drawn))
    stored = [_stored([row]) for row, _ in rows if isinstance(row, WeightRow)]
    description = f"A grid of {len(strips)} kinds of weights by {len(report.blocks)} blocks."
    if stored:
        description += f" Quantized weights have {min(stored):.2f} to {max(stored):.2f} stored bits, with their scales."
    said = "Its stored bits per weight in each of {} blocks"
    return Heat("bits-map", "Bits of every weight", description, labels_of(report), strips, [], _key(report), said)


def outside_map(report: Report, rows: Sequence[Row]) -> Heat | None:
    """Stored bits of the weights outside the blocks: a strip for those that differ only in numbers, a cell for each."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(NUMBER.sub("*", row.name), []).append(row)
    levels, strips = _levels(report), []
    for kind, alike in kinds.items():
        cells = [_cell(i, row.name, [row], levels) for i, row in enumerate(alike)]
        strips.append(Strip(kind if len(alike) > 1 else alike[0].name, _detail([alike]), cells))
    columns = [str(i + 1) for i in range(max(map(len, kinds.values()), default=0))]
    description = f"{len(rows)} weights, in the same colours."
    said = "The stored bits per weight of {} weights"
    return Heat("bits-outside", "Outside the blocks", description, columns, strips, [], said=said) if rows else None


def _stored(rows: Iterable[Row]) -> float:
    """Bits per value on disk, of all rows together."""
    found = list(rows)
    return 8 * sum(row.bytes for row in found) / max(1, sum(math.prod(row.shape) for row in found))


def _scheme(row: Row) -> str:
    return row.scheme.told if isinstance(row, WeightRow) else f"not quantized ({row.reason})"


def _levels(report: Report) -> dict[int, int]:
    """The colour of each number of bits: as far apart as the scale allows."""
    found = sorted({row.scheme.bits for row in report.quantized})
    if len(found) == 1:
        return {found[0]: LEVELS // 2}
    return {count: round((LEVELS - 1) * i / (len(found) - 1)) for i, count in enumerate(found)}


def _key(report: Report) -> list[tuple[int | None, str]]:
    """The colours with the number of weights that have them, in the blocks and outside."""
    counts = Counter(row.scheme.bits for row in report.quantized)
    key: list[tuple[int | None, str]] = [
        (level, f"{count}-bit: {_weights(counts[count])}") for count, level in _levels(report).items()
    ]
    left = len(report.kept)
    return [*key, (None, f"not quantized: {_weights(left)}")] if left else key


def _weights(count: int) -> str:
    return f"{count:,} weight{'' if count == 1 else 's'}"


def _cell(at: int, where: str, alike: Sequence[Row], levels: dict[int, int]) -> Cell:
    """A weight, or several of one kind: coloured by their mean bits, with all of their schemes in words."""
    quantized = [row for row in alike if isinstance(row, WeightRow)]
    schemes = Counter(map(_scheme, alike))
    told = ", ".join(name if len(schemes) == 1 else f"{count} × {name}" for name, count in schemes.most_common())
    stored = f"{_stored(alike):.2f}"
    among = f", {len(alike)} weights" if len(alike) > 1 else ""
    text, number = f"{where}: {stored} stored bits{among}, {told}", f"{stored}, {told}"
    if not quantized:
        return Cell(at, None, text, number)
    mean = sum(row.scheme.bits for row in quantized) / len(quantized)
    return Cell(at, levels[min(levels, key=lambda count: abs(count - mean))], text, number)


def _detail(places: Iterable[Sequence[Row]]) -> str:
    """How many weights of a kind a cell has, if not one, and their shape, if it is the same everywhere."""
    found = list(places)
    shapes = {row.shape for alike in found for row in alike}
    most = max(len(alike) for alike in found)
    parts = [f"{most} weights"] if most > 1 else []
    return " ".join([*parts, *(["×".join(map(str, next(iter(shapes))))] if len(shapes) == 1 else [])])


def curve(row: BitsRow) -> Curve | None:
    """The plot of size against divergence; None if nothing in it can be drawn on a logarithmic axis."""
    one = row.chosen
    known = [
        ("", name.removesuffix(" symmetric"), f"{name} for all weights", at, predicted, "predicted")
        for name, at, predicted in row.uniform
    ]
    known.append(("on", "chosen", "the choice", one.bits, one.predicted, "predicted"))
    for label, said, value in (("measured", "without corrections", one.truth), ("written", "as written", row.written)):
        if value is not None:
            known.append(("truth", label, f"the choice {said}", one.bits, value, "measured"))
    points = [point for point in known if _drawable(point[4])]
    # Beyond the largest scheme the curve only falls to nothing, and would squeeze all that is of interest.
    most = max((point[3] for point in points), default=one.bits)
    best = [(at, loss) for at, loss in row.curve if _drawable(loss) and at <= most + 1e-9]
    if not best and not points:
        return None
    widths = [at for at, _ in best] + [point[3] for point in points]
    up = _up([loss for _, loss in best] + [point[4] for point in points])
    first, last = math.floor(min(widths)), max(math.floor(min(widths)) + 1, math.ceil(max(widths)))

    def x(at: float) -> float:
        return round(100 * (at - first) / (last - first), 2)

    def y(loss: float) -> float:
        return round(HEIGHT * (1 - math.log(loss / up[0]) / math.log(up[-1] / up[0])), 1)

    marks: list[Mark] = []
    taken: list[Label] = []
    for style, name, said, at, loss, how in sorted(points, key=lambda point: -point[4]):
        label = name if len(name) <= LABEL else f"{name[: LABEL - 1]}…"
        left = Label(x(at), 0, label, left=False).ends[1] > Label(100, 0, "", left=False).ends[0]
        taken.append(free(x(at), y(loss), label, left, taken, HEIGHT))
        text = f"{said}: {at:.2f} stored bits per weight, {digits(loss)} nats {how}"
        marks.append(Mark(label, style, x(at), y(loss), left, round(taken[-1].y, 1), text))
    step = math.ceil((last - first) / 8)
    drawn = {mark.style for mark in marks} | ({"front"} if best else set())
    return Curve(
        _described(row),
        " ".join(f"{x(at):g},{100 * y(loss) / HEIGHT:.2f}" for at, loss in best),
        sorted(marks, key=lambda mark: mark.style == "on"),
        [(x(at), str(at)) for at in range(first, last + 1, step)],
        [(y(tick), f"{tick:g}") for tick in up],
        [(style, meaning) for style, meaning in KEY.items() if style in drawn],
        ["choice", "stored bits", "divergence, nats", "how known"],
        [[said, f"{at:.2f}", digits(loss), how] for _, _, said, at, loss, how in known]
        + [["best of its size", f"{at:.2f}", digits(loss), "predicted"] for at, loss in row.curve],
    )


def _drawable(loss: float) -> bool:
    return math.isfinite(loss) and loss > 0


def _up(values: Sequence[float]) -> list[float]:
    """Ticks of the divergences, at least two."""
    found = decades(values)
    return found if len(found) > 1 else [found[0] / 2, found[0], 2 * found[0]]


def _described(row: BitsRow) -> str:
    one = row.chosen
    told = (
        f"Stored bits per weight from left to right, divergence from the unquantized model upwards, in nats, on a "
        f"logarithmic axis. The choice has {one.bits:.2f} bits and {_nats(one.predicted)} nats predicted"
    )
    told += (
        f", {_nats(one.truth)} measured with all weights rounded and none corrected" if one.truth is not None else ""
    )
    told += f", {_nats(row.written)} as written" if row.written is not None else ""
    return told + (f"; {row.beside}." if row.beside else ".")


def _nats(value: float | None) -> str:
    return "" if value is None else digits(value)
