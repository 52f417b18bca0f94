"""The text and tables of a run's page: headline, unquantized weights, fallbacks, undone attempts, recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import yaml

from llmq.block.attempt import Attempt, Outcome
from llmq.machine import size
from llmq.report.measured import Row, digits
from llmq.report.report import Report
from llmq.report.rows import WeightRow

T = TypeVar("T")
WORST = 12
NAMES = 400
"""The number of names listed per group; report.json has the others."""


@dataclass(frozen=True)
class Figure:
    """A number of the headline."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Group:
    """Weights or attempts with the same outcome: what, how many, and which; more: how many are not listed."""

    what: str
    detail: str
    items: list[tuple[str, str]]
    more: int


def title(report: Report) -> str:
    """The page's title: the folder's name."""
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
    """Seconds formatted for people: 4.2 s, 3 min 26 s, 5 h 8 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def worst(report: Report) -> list[list[str]]:
    """The weights with the largest error: name, shape, bits, error."""
    rows = sorted(report.quantized, key=lambda row: -row.error)
    return [
        [row.name, "×".join(map(str, row.shape)), f"{_bits(row):.2f}", digits(row.error, 3)] for row in rows[:WORST]
    ]


def _bits(row: WeightRow) -> float:
    return 8 * row.bytes / max(1, prod(row.shape))


def tried(report: Report) -> tuple[int, int]:
    """How many changes to the blocks were tried, and how many of them were kept."""
    kept = len(report.attempts(Outcome.KEPT))
    return kept + len(report.attempts(Outcome.UNDONE)), kept


def undone(report: Report) -> list[Group]:
    """The undone attempts, by method; those on whole blocks first."""

    def what(entry: tuple[str, Attempt]) -> str:
        return f"{entry[1].method}, {'whole block' if entry[1].whole else 'one pair of weights'}"

    return _groups(report.attempts(Outcome.UNDONE), what, lambda entry: (entry[0], str(entry[1])))


def skipped(report: Report) -> list[Group]:
    """The blocks in which a method had nothing to do, by method and reason."""
    return _groups(report.attempts(Outcome.SKIPPED), lambda entry: str(entry[1]), lambda entry: (entry[0], ""))


def notes(report: Report) -> list[Group]:
    """Weights with a fallback, by the kind of fallback."""
    return _groups(report.fallbacks, lambda entry: entry[1], lambda entry: (entry[0], ""))


def left(report: Report) -> list[Group]:
    """Unquantized weights, by reason, with their size."""
    groups = _groups(
        report.kept,
        lambda row: str(row.reason),
        lambda row: (row.name, f"{'×'.join(map(str, row.shape))}, {size(row.bytes)}"),
    )
    total: dict[str, int] = {}
    for row in report.kept:
        total[str(row.reason)] = total.get(str(row.reason), 0) + row.bytes
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
