"""What the command line says of a finished run."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llmq import job
from llmq.block.attempt import Attempt, Outcome
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe
from llmq.report import terminal
from tests.llmq.report.page.reports import report


def test_what_was_tried_and_left_is_counted() -> None:
    made = report(3)
    idle = Attempt("SignRound", None, None, None, Outcome.SKIPPED, why="nothing to refine")
    made.blocks[1:] = [replace(block, log=(*block.log, idle)) for block in made.blocks[1:]]
    console = Console(file=io.StringIO(), width=200)
    terminal.report(console, made)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tried 6 changes to the blocks, kept 3, undid 3" in said
    assert "undone in model.layers.1: awq: norm → query, key: error" in said
    assert "skipped in 2 blocks: SignRound: nothing to refine" in said
    assert "model.layers.0.attn.out: damped 10 times more" in said
    assert "kept (kept by --keep): model.layers.0.attn.value" in said
    assert "kept (outside the decoder blocks): head" in said


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("<s>see\nd\u00e9j\u00e0\x1b[31m", "utf-8", "'<s>see\\nd\u00e9j\u00e0\\x1b[31m'"),
        ("d\u00e9j\u00e0 \U0001f41d", "ascii", "'d\\xe9j\\xe0 \\U0001f41d'"),
        ("d\u00e9j\u00e0 \U0001f41d", "latin-1", "'d\u00e9j\u00e0 \\U0001f41d'"),
        ("s" * 1000, "utf-8", "'" + "s" * 300 + "' ... 700 more"),
    ],
)
def test_a_window_is_shown_on_one_line_in_any_encoding(text: str, encoding: str, shown: str) -> None:
    assert terminal.readable(text, encoding) == shown
    shown.encode(encoding)


def test_a_plan_shows_the_first_window(tiny_model: Path, tmp_path: Path) -> None:
    """And what markup there is in it is text."""
    text_file = tmp_path / "a.txt"
    text_file.write_text("[bold]see[/] noon\n" * 40, encoding="utf-8")
    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(text=str(text_file), samples=1, seqlen=32))
    console = Console(file=io.StringIO(), width=400)
    terminal.plan(console, job.plan(str(tiny_model), recipe))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "first window  '[bold]see[/] noon\\n[bold]see[/] n'" in said
