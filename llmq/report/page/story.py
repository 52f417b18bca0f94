"""What a run did, in words and tables: the headline, what was left alone, fell back or was undone, the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmq.machine import size
from llmq.report.measured import Row, digits
from llmq.report.report import Report, describe, whole

T = TypeVar("T")
WORST = 12
NAMES = 400
"""Names listed of one group; the report has the others."""


@dataclass(frozen=True)
class Figure:
    """A number of the headline."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Group:
    """What went the same way: what, how many, and which; more: how many are not listed."""

    what: str
    detail: str
    items: list[tuple[str, str]]
    more: int


def title(report: Report) -> str:
    """What the page is about: the folder's name."""
    return Path(report.out).name or report.out


def headline(report: Report, measured: Sequence[Row] = ()) -> list[Figure]:
    """The numbers that people ask for first."""
    found = [
        Figure("Size", size(report.bytes), f"{report.ratio:.2f} times smaller than {size(report.source_bytes)}"),
        Figure("Bits per weight", f"{report.bits_per_weight:.2f}", f"{report.bits_per_weight_whole:.2f} whole model"),
    ]
    for row in [row for row in measured if row.metric == "perplexity"][:1]:
        beside = f"{row.base} of the base, {row.recovery} kept" if row.base else row.task
        found.append(Figure("Perplexity", row.value, beside))
    predicted = f"{size(report.predicted_memory)} predicted"
    found.append(Figure("Peak memory", size(report.peak_memory), predicted))
    per_block = f"{duration(report.seconds / len(report.blocks))} per block" if report.blocks else ""
    found.append(Figure("Time", duration(report.seconds), per_block))
    return found


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 26 s, 5 h 8 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def worst(report: Report) -> list[list[str]]:
    """The weights that lost most: name, shape, bits, error."""
    rows = sorted((row for row in report.weights if row["scheme"] is not None), key=lambda row: -row["error"])
    return [
        [row["name"], "×".join(map(str, row["shape"])), f"{_bits(row):.2f}", digits(row["error"], 3)]
        for row in rows[:WORST]
    ]


def _bits(row: dict[str, Any]) -> float:
    return float(8 * row["bytes"] / max(1, prod(row["shape"])))


def tried(report: Report) -> tuple[int, int]:
    """How many changes to the blocks were tried, and how many of them stood."""
    lines = [line for block in report.blocks for line in block.get("log", [])]
    return len(lines), sum(line["kept"] for line in lines)


def undone(report: Report) -> list[Group]:
    """What was tried on a block and undone, by method; what judges whole blocks first."""
    lines = [(block["name"], line) for block in report.blocks for line in block.get("log", []) if not line["kept"]]

    def what(entry: tuple[str, dict[str, Any]]) -> str:
        name = str(entry[1]["what"]).partition(": ")[0]
        return f"{name}, whole block" if whole(entry[1]) else f"{name}, one pair of weights"

    return _groups(lines, what, lambda entry: (entry[0], describe(entry[1])))


def notes(report: Report) -> list[Group]:
    """Weights that did not go the usual way, by what happened."""
    return _groups(report.fallbacks, lambda entry: entry[1], lambda entry: (entry[0], ""))


def left(report: Report) -> list[Group]:
    """Weights left alone, by the reason, with their size."""
    rows = [row for row in report.weights if row["scheme"] is None]
    groups = _groups(
        rows,
        lambda row: str(row["kept"]),
        lambda row: (row["name"], f"{'×'.join(map(str, row['shape']))}, {size(row['bytes'])}"),
    )
    total: dict[str, int] = {}
    for row in rows:
        total[row["kept"]] = total.get(row["kept"], 0) + row["bytes"]
    return [
        Group(group.what, f"{group.detail}, {size(total[group.what])}", group.items, group.more) for group in groups
    ]


def _groups(entries: Iterable[T], what: Callable[[T], str], item: Callable[[T], tuple[str, str]]) -> list[Group]:
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        found.setdefault(what(entry), []).append(item(entry))
    return [
        Group(name, str(len(items)), items[:NAMES], max(0, len(items) - NAMES))
        for name, items in sorted(found.items(), key=lambda pair: -len(pair[1]))
    ]


def recipe(report: Report) -> str:
    """The recipe as a YAML file that `--recipe` reads."""
    return yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)
