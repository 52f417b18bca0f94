"""A comparison as a table: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.machine import size
from llmq_eval.comparison import Cell, Comparison, Contrast, Line
from llmq_eval.results import Measure

COLUMNS = (
    *("model", "bytes", "bits_per_weight", "task", "metric", "value", "low", "high", "unit"),
    *("recovery", "difference", "p_adjusted", "verdict", "protocol"),
)
PAIR_COLUMNS = (
    *("task", "metric", "first", "second", "difference", "low", "high", "p", "p_adjusted"),
    *("test", "verdict", "protocol"),
)
MARKS = {"within noise": "≈", "better": "▲", "worse": "▼"}
ARROWS = {True: " ↑", False: " ↓", None: ""}
"""Which direction is better."""
SKEWED = 1.5
"""If one side of an interval is this much longer than the other, ± would mislead."""
LEGEND = (
    "± half of the 95 % interval; % of the base; against the base ≈ within noise, ▲ better, ▼ worse (p < 0.05, Holm)"
)


def terminal(console: Console, found: Comparison, pairs: bool = False, plain: bool = False) -> None:
    """Print the table, the models' ranks on each measure, the Pareto front, and the protocols.

    plain: only the table and the protocols.
    """
    headings, rows = _grid(found)
    # Models that do not fit side by side follow in further tables below.
    fit = max(1, (console.width - 32) // 26)
    for start in range(1, len(headings), fit):
        part = slice(start, start + fit)
        _print(console, [headings[0], *headings[part]], [[row[0], *row[part]] for row in rows])
        console.print()
    tested = any(line.cells[i].to_base for line in found.lines for i in range(len(found.models)))
    if tested:
        console.print(LEGEND, style="dim", highlight=False)
    if pairs:
        console.print()
        _print(console, *_pairs(found))
    told = (
        [] if plain else [*([] if pairs else ranks(found)), *front(found), *(f"note: {note}" for note in found.notes)]
    )
    for text in told:
        console.print(escape(text), highlight=False)
    for number, protocol in enumerate(found.protocols, 1):
        console.print(f"protocol [{number}]: {protocol}", style="dim", highlight=False, markup=False)


def markdown(found: Comparison, pairs: bool = False) -> str:
    """The same tables as Markdown."""
    parts = [_markdown(*_grid(found)), LEGEND + "."]
    parts += [_markdown(*_pairs(found))] if pairs else ["\n".join(f"- {line}" for line in ranks(found))]
    parts += ["\n".join(f"- {text}" for text in (*front(found), *found.notes))]
    parts += ["\n".join(f"- [{number}] {protocol}" for number, protocol in enumerate(found.protocols, 1))]
    return "\n\n".join(part for part in parts if part) + "\n"


def comma_separated(found: Comparison, pairs: bool = False) -> str:
    """CSV with one row per number, with all digits; pairs: one row per tested difference instead."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    if pairs:
        out.writerow(PAIR_COLUMNS)
        for one in found.contrasts:
            first, second = found.models[one.first], found.models[one.second]
            numbers = (one.difference, one.low, one.high, one.p, one.p_adjusted)
            out.writerow(
                [one.task, one.metric, first, second, *map(_exact, numbers), one.test, one.verdict, one.protocol]
            )
        return text.getvalue()
    out.writerow(COLUMNS)
    for line in found.lines:
        for name, results, cell in zip(found.models, found.results, line.cells, strict=True):
            if cell.measure is None:
                continue
            measure, to_base = cell.measure, cell.to_base
            out.writerow(
                [name, results.bytes, _exact(results.bits_per_weight), line.task, line.metric]
                + [*map(_exact, (measure.value, measure.low, measure.high)), measure.unit, _exact(cell.recovery)]
                + [
                    _exact(None if to_base is None else to_base.difference),
                    _exact(None if to_base is None else to_base.p_adjusted),
                ]
                + [to_base.verdict if to_base else "", measure.protocol]
            )
    return text.getvalue()


def ranks(found: Comparison) -> list[str]:
    """For each tested measure the models from best to worst, '≈' between neighbours within noise, '>' otherwise."""
    told = []
    tested: dict[str, dict[frozenset[int], Contrast]] = {}
    for one in found.contrasts:
        tested.setdefault(found.line(one).title, {})[frozenset((one.first, one.second))] = one
    for line in found.lines:
        of = tested.get(line.title, {})
        there = [(i, cell.measure.value) for i, cell in enumerate(line.cells) if cell.measure]
        if not of or line.higher_is_better is None:
            continue
        there.sort(key=lambda pair: (math.isnan(pair[1]), -pair[1] if line.higher_is_better else pair[1]))
        words = [found.models[there[0][0]]]
        for (before, _), (after, _) in zip(there, there[1:], strict=False):
            contrast = of.get(frozenset((before, after)))
            mark = "?" if contrast is None else "≈" if contrast.verdict == "within noise" else ">"
            words += [mark, found.models[after]]
        told.append(f"{_title(line)}: {' '.join(words)}")
    return told


def front(found: Comparison) -> list[str]:
    """The Pareto front in a line."""
    if not found.pareto:
        return []
    inside = sorted((point for point in found.pareto if point.front), key=lambda point: point.bytes)
    names = ", ".join(f"{found.models[p.model]} ({size(p.bytes)}, KL {p.kl:.4g})" for p in inside)
    return [f"no other is both smaller and closer to the base: {names}"]


def _grid(found: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = [
        ["size", *(size(one.bytes) for one in found.results)],
        ["bits per weight", *(f"{one.bits_per_weight:.2f}" if one.bits_per_weight else "?" for one in found.results)],
    ]
    rows += [
        [_title(line), *(_cell(cell, i == found.base) for i, cell in enumerate(line.cells))] for line in found.lines
    ]
    names = [name + (" (base)" if i == found.base else "") for i, name in enumerate(found.models)]
    return ["", *names], rows


def _pairs(found: Comparison) -> tuple[list[str], list[list[str]]]:
    return ["measure", "first", "second", "first − second", "95 % interval", "p (Holm)", ""], [
        [
            found.line(one).title,
            found.models[one.first],
            found.models[one.second],
            f"{one.difference:+.4g}",
            "" if one.low is None or one.high is None else f"{one.low:+.3g} … {one.high:+.3g}",
            f"{one.p_adjusted:.2g}",
            _said(one),
        ]
        for one in found.contrasts
    ]


def _said(one: Contrast) -> str:
    return f"{one.verdict} ({one.test})"


def _title(line: Line) -> str:
    unit = f" ({line.unit})" if line.unit in ("nats", "s", "tokens/s") else ""
    return f"{line.title}{unit}{ARROWS[line.higher_is_better]}"


def _cell(cell: Cell, base: bool) -> str:
    if cell.measure is None:
        return ""
    recovery = "" if cell.recovery is None or base else f" {cell.recovery:.1f} %"
    mark = "" if cell.to_base is None else f" {MARKS[cell.to_base.verdict]}"
    return shown(cell.measure) + recovery + mark


def shown(one: Measure) -> str:
    """A measure with its interval as ±, or as its two ends: '58.20 % ± 1.1', '0.2 (0.1 … 0.6)', '1 GiB'."""
    if one.unit == "bytes":
        return size(one.value)
    factor, unit = (100, " %") if one.unit == "share" else (1, "")
    digits = ".2f" if unit else ".4f" if one.metric == "perplexity" else ".4g"
    number = f"{factor * one.value:{digits}}{unit}"
    if one.low is None or one.high is None:
        return number
    below, above = factor * (one.value - one.low), factor * (one.high - one.value)
    if max(below, above) > SKEWED * min(below, above):
        return f"{number} ({factor * one.low:.4g} … {factor * one.high:.4g})"
    return f"{number} ± {(below + above) / 2:.2g}"


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _print(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---", *(["---:"] * (len(headings) - 1))]
    return "\n".join([line(headings), line(marks), *map(line, rows)])
