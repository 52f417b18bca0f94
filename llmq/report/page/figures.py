"""The figures of a run: error per weight, error along the depth, time and memory along the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isfinite

from llmq.report.measured import digits
from llmq.report.page.charts import Cell, Given, Heat, Plot, Scale, Strip, plot
from llmq.report.report import Report
from llmq.report.rows import BlockRow, KeptRow, WeightRow

Row = WeightRow | KeptRow
MANY = 24
"""With more kinds of weights than this, those that differ only in a number are shown as one; experts always are."""
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def heat(report: Report) -> Heat | None:
    """Error per weight: a column for each block, a strip for each kind of weight; None if nothing is quantized.

    The weights of a block's experts that differ only in numbers share a strip, and if a block has very many weights, so
    do others: its colour is their mean error, its tooltip also gives the largest.
    """
    rows = [(row, row.block) for row in report.weights if row.block is not None]
    kinds = kinds_of(report, rows)
    quantized = {kind for (row, _), kind in zip(rows, kinds, strict=True) if isinstance(row, WeightRow)}
    if not quantized:
        return None
    cells: dict[str, dict[int, list[Row]]] = {}
    for (row, at), kind in zip(rows, kinds, strict=True):
        if kind in quantized:
            cells.setdefault(kind, {}).setdefault(at, []).append(row)
    means = {
        (kind, at): sum(errors) / len(errors)
        for kind, places in cells.items()
        for at, alike in places.items()
        if (errors := [row.error for row in _quantized(alike)])
    }
    scale = Scale(list(means.values()))
    order = order_of(rows, kinds)
    strips = []
    for kind, places in sorted(cells.items(), key=lambda item: order[item[0]]):
        drawn = [_cell(kind, at, alike, means.get((kind, at)), scale) for at, alike in sorted(places.items())]
        strips.append(Strip(kind, _detail(places), drawn))
    edges = [digits(edge, 2) for edge in scale.edges()]
    steps = [(i, edges[i], edges[i + 1]) for i in range(len(edges) - 1)] if scale.high > scale.low else []
    worst = max(means, key=lambda place: means[place])
    least = min(means, key=lambda place: means[place])
    description = (
        f"A grid of {len(strips)} kinds of weights by {len(report.blocks)} blocks. "
        f"The largest error is {digits(means[worst], 3)} ({worst[0]} in block {worst[1]}), "
        f"the smallest {digits(means[least], 3)} ({least[0]} in block {least[1]})."
    )
    return Heat("heat", "Error of every weight", description, labels_of(report), strips, steps)


def _quantized(rows: Iterable[Row]) -> list[WeightRow]:
    return [row for row in rows if isinstance(row, WeightRow)]


def kinds_of(report: Report, rows: Sequence[tuple[Row, int]]) -> list[str]:
    """The name of each weight inside its block; all experts' weights of one kind have one name."""
    inside = [_inside(row.name, report.blocks[at].name) for row, at in rows]
    numbered = [getattr(row, "expert", None) is not None for row, _ in rows]
    if len({name for name, expert in zip(inside, numbered, strict=True) if not expert}) > MANY:
        numbered = [True] * len(inside)
    return [NUMBER.sub("*", name) if so else name for name, so in zip(inside, numbered, strict=True)]


def order_of(rows: Sequence[tuple[Row, int]], kinds: Sequence[str]) -> dict[str, float]:
    """The average position of each kind of weight in its block; in a report, unquantized weights come last."""
    counts: dict[int, int] = {}
    places: dict[str, list[int]] = {}
    for (row, at), kind in zip(rows, kinds, strict=True):
        if isinstance(row, WeightRow):
            counts[at] = counts.get(at, 0) + 1
            places.setdefault(kind, []).append(counts[at])
    return {kind: sum(found) / len(found) for kind, found in places.items()}


def _inside(name: str, block: str) -> str:
    """The part of a weight's name inside its block; a checkpoint may have another prefix before the block's number."""
    if name.startswith(f"{block}."):
        return name.removeprefix(f"{block}.")
    number = block.rpartition(".")[2]
    return name.partition(f".{number}.")[2] or name


def _cell(kind: str, at: int, alike: list[Row], mean: float | None, scale: Scale) -> Cell:
    where = f"block {at}, {kind}"
    if mean is None:
        reason = next(str(row.reason) for row in alike if isinstance(row, KeptRow))
        return Cell(at, None, f"{where}: not quantized ({reason})", "not quantized")
    text = digits(mean, 3)
    if len(alike) == 1:
        return Cell(at, scale.level(mean), f"{where}: {text}", text)
    chosen = _quantized(alike)
    largest = max(chosen, key=lambda row: row.error)
    more = f"mean of {len(chosen)}, largest {digits(largest.error, 3)} ({largest.name})"
    return Cell(at, scale.level(mean), f"{where}: {text}, {more}", f"{text} (largest {digits(largest.error, 3)})")


def _detail(places: dict[int, list[Row]]) -> str:
    """Details of a strip: its shape and bits, if they are the same in all blocks."""
    rows = [row for alike in places.values() for row in _quantized(alike)]
    shapes = {row.shape for row in rows}
    bits = sorted({row.scheme.bits for row in rows})
    per_block = max(len(alike) for alike in places.values())
    parts = [f"{per_block} weights"] if per_block > 1 else []
    parts += ["×".join(map(str, next(iter(shapes))))] if len(shapes) == 1 else []
    return " ".join([*parts, f"{'/'.join(map(str, bits))}-bit"])


def depth(report: Report) -> Plot | None:
    """The error of each block's output, and the error before the methods' changes."""
    if not report.blocks:
        return None
    errors = [block.error for block in report.blocks]
    before = [_before(block) for block in report.blocks]
    given = [Given("as written", "line", errors)]
    if any(value is not None for value in before):
        given.insert(0, Given("before the methods' changes", "before", before))
    worst = max(range(len(errors)), key=lambda i: errors[i] if isfinite(errors[i]) else -1)
    description = (
        f"The relative error of the output of {len(errors)} blocks on the calibration text. "
        f"It is largest in block {worst} ({digits(errors[worst], 3)}), "
        f"{digits(errors[0], 3)} in the first block and {digits(errors[-1], 3)} in the last."
    )
    return plot("depth", "Error of each block's output", description, labels_of(report), given, _three, tick=_two)


def _before(block: BlockRow) -> float | None:
    """A block's error before the first change that was judged by the real quantizer, if there was one."""
    return next((tried.before for tried in block.log if tried.whole and tried.before is not None), None)


def seconds(report: Report) -> Plot | None:
    """Time of each block."""
    if not report.blocks:
        return None
    times = [block.seconds for block in report.blocks]
    description = (
        f"Seconds spent on each of {len(times)} blocks, {digits(sum(times), 3)} in all; "
        f"the shortest took {digits(min(times), 3)}, the longest {digits(max(times), 3)}."
    )
    given = [Given("seconds", "bars", times, bars=True)]
    return plot(
        "seconds", "Seconds per block", description, labels_of(report), given, _three, tick=lambda v: f"{v:g} s"
    )


def memory(report: Report) -> Plot | None:
    """Memory after each block; None if the run did not record it."""
    if all(block.peak is None for block in report.blocks):
        return None
    unit, name = (2**30, "GiB") if report.peak_memory >= 2**30 else (2**20, "MiB")

    def shown(values: Iterable[int | None]) -> list[float | None]:
        return [None if value is None else value / unit for value in values]

    predicted = report.predicted_memory / unit
    given = [
        Given("predicted", "limit", [predicted] * len(report.blocks)),
        Given("largest so far", "before", shown(block.peak for block in report.blocks)),
        Given("at the block's end", "line", shown(block.memory for block in report.blocks)),
    ]

    def text(value: float) -> str:
        return f"{digits(value, 3)} {name}"

    description = (
        f"Resident memory of the process after each block, its largest value until then, and the {text(predicted)} "
        f"that the plan predicted. The whole run's peak was {text(report.peak_memory / unit)}."
    )
    return plot(
        "memory", "Memory", description, labels_of(report), given, text, tick=lambda value: f"{value:g} {name}",
        caption="A run that was resumed shows each block's memory in the process that quantized it.",
    )  # fmt: skip


def device(report: Report) -> Plot | None:
    """The GPU's memory for each block; None without a GPU."""
    values = [block.device for block in report.blocks]
    most = max((value for value in values if value is not None), default=None)
    if most is None:
        return None
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    predicted = report.predicted_device_memory / unit
    given = [Given("most in the block", "line", [None if value is None else value / unit for value in values])]
    if predicted:
        given.insert(0, Given("predicted", "limit", [predicted] * len(values)))

    def text(value: float) -> str:
        return f"{digits(value, 3)} {name}"

    description = (
        f"The most that tensors took on the GPU while each block was quantized, {text(most / unit)} at most"
        + (f"; the plan predicted {text(predicted)}." if predicted else ".")
    )
    return plot(
        "device", "GPU memory", description, labels_of(report), given, text, tick=lambda value: f"{value:g} {name}"
    )


def labels_of(report: Report) -> list[str]:
    return [f"block {i}" for i in range(len(report.blocks))]


def _two(value: float) -> str:
    return f"{value:.6g}"


def _three(value: float) -> str:
    return digits(value, 3)
