"""What the command line says of a finished run."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from llmq.block.attempt import Attempt, Outcome
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
