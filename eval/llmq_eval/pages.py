"""compare.html, and the measurements in the report.html and model card of the measured folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import PackageLoader

from llmq.errors import LlmqError
from llmq.machine import size
from llmq.report import card, page
from llmq.report.measured import digits, interval, value
from llmq.report.page.frame import render
from llmq.report.report import Report
from llmq_eval import scatter, store, tables
from llmq_eval.comparison import Cell, Comparison, Line
from llmq_eval.results import Results


@dataclass(frozen=True)
class Entry:
    """A cell of the table as text. sort: the number; verdict: against the base, '' if not tested."""

    value: str
    interval: str
    recovery: str
    verdict: str
    sort: str


@dataclass(frozen=True)
class Row:
    """A model's line."""

    name: str
    base: bool
    entries: list[Entry]


def compare_page(found: Comparison) -> str:
    """compare.html: the table with intervals and verdicts, the plot of size and divergence, each measure's numbers."""
    return render(
        "compare.html.j2",
        loaders=[PackageLoader("llmq_eval")],
        models=len(found.models),
        base=None if found.base is None else found.models[found.base],
        headings=["size", "bits per weight", *map(heading, found.lines)],
        rows=rows(found),
        ranks=tables.ranks(found),
        pareto=scatter.pareto(found),
        height=scatter.HEIGHT,
        dots=scatter.dots(found),
        pairs=pairs(found),
        notes=found.notes,
        protocols=found.protocols,
    )


def write(file: Path, found: Comparison) -> None:
    """Write compare.html to a file. Raises LlmqError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(compare_page(found), encoding="utf-8")
    except OSError as error:
        raise LlmqError(f"{file}: cannot be written: {error.strerror}") from error


def tell_folders(results: Sequence[Results], out: Path, note: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Add measurements to the report.html and the card of each folder that llmq wrote; returns the changed files.

    Writes every stored measurement of a model and its base under `out`, not only those of this call's `results`.
    A folder that cannot be written, or whose card llmq did not write, is unchanged and reported by `note`; its results
    are stored under `out` anyway.
    """
    saved = [_saved(one, out) for one in results]
    of = {one.model: one for one in saved}
    written: list[Path] = []
    for one in saved:
        folder = Path(one.model)
        if not (folder.is_absolute() and Report.there(folder)):
            continue
        found = (of.get(one.base) or store.newest(one.base, out)) if one.base else None
        base = found.measures if found else []
        for tell in (page.write_page, card.write_measured):
            try:
                written.append(tell(folder, one.measures, base))
            except LlmqError as error:
                note(f"numbers not added: {error}")
    return written


def _saved(one: Results, out: Path) -> Results:
    """A model's results on disk; `one` itself if they cannot be read."""
    try:
        return Results.load(one.path(out))
    except LlmqError:
        return one


def heading(line: Line) -> str:
    """A measure's name, its unit if the cells do not show it, and which direction is better."""
    return f"{line.title}{tables.ARROWS[line.higher_is_better]}"


def rows(found: Comparison) -> list[Row]:
    """A row for each model: its size, then every measure."""
    made = []
    for i, (name, results) in enumerate(zip(found.models, found.results, strict=True)):
        first = [
            Entry(size(results.bytes), "", "", "", str(results.bytes)),
            Entry(f"{results.bits_per_weight:.2f}", "", "", "", str(results.bits_per_weight)),
        ]
        made.append(
            Row(name, i == found.base, [*first, *(_entry(line.cells[i], i == found.base) for line in found.lines)])
        )
    return made


def _entry(cell: Cell, base: bool) -> Entry:
    if cell.measure is None:
        return Entry("", "", "", "", "")
    m = cell.measure
    recovery = "" if cell.recovery is None or base else f"{cell.recovery:.1f} %"
    return Entry(
        value(m.value, m.unit), interval(m), recovery, cell.to_base.verdict if cell.to_base else "", repr(m.value)
    )


def pairs(found: Comparison) -> list[list[str]]:
    """Every tested difference, as text."""
    return [
        [
            found.line(one).title,
            found.models[one.first],
            found.models[one.second],
            f"{one.difference:+.4g}",
            "" if one.low is None or one.high is None else f"{one.low:+.3g} … {one.high:+.3g}",
            "" if one.p_adjusted is None else digits(one.p_adjusted, 2),
            f"{one.verdict} ({one.test})",
        ]
        for one in found.contrasts
    ]
