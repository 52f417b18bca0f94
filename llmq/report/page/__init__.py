"""Self-contained pages: one HTML file each, made from templates, that loads nothing else.

Every figure is an SVG with a title, a description and a table of the same numbers. Colours are CSS variables with a
light and a dark set; a content security policy with the hashes of the page's own style and script forbids everything
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.report.measured import Measure, rows
from llmq.report.page.frame import render

if TYPE_CHECKING:
    from llmq.report.report import Report

__all__ = ["PAGE", "report_page", "write_page"]

PAGE = "report.html"


def report_page(report: Report, measures: Iterable[Measure] = (), base: Iterable[Measure] = ()) -> str:
    """report.html of a run. measures: of the quantized model; base: of the base model."""
    from llmq.report.experts import experts_of
    from llmq.report.page import bits, experts, figures, story

    measured = rows(measures, base)
    return render(
        "report.html.j2",
        title=story.title(report),
        report=report,
        headline=story.headline(report, measured),
        measured=measured,
        bits=bits.bits(report),
        heat=figures.heat(report),
        experts=experts.clouds(experts_of(report)),
        depth=figures.depth(report),
        seconds=figures.seconds(report),
        memory=figures.memory(report),
        device=figures.device(report),
        worst=story.worst(report),
        undone=story.undone(report),
        skipped=story.skipped(report),
        tried=story.tried(report),
        notes=story.notes(report),
        left=story.left(report),
        recipe=story.recipe(report),
        command=report.command,
    )


def write_page(folder: Path, measures: Iterable[Measure] = (), base: Iterable[Measure] = ()) -> Path:
    """Write a finished folder's report.html again, with its measurements.

    Raises LlmqError if the folder has no report, or cannot be written.
    """
    from llmq.checkpoint.files import write
    from llmq.report.report import Report

    page = folder / PAGE
    text = report_page(Report.load(folder), measures, base)
    write(page, text)
    return page
