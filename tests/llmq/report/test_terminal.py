"""What the command line says of a finished run."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmq import job
from llmq.block.attempt import Attempt, Outcome
from llmq.formats.base import UNKNOWN
from llmq.formats.inspection import inspect_folder
from llmq.grids.scheme import Scheme
from llmq.machine import size
from llmq.recipe.recipe import Calibration, Recipe
from llmq.report import terminal
from llmq.report.measured import digits
from llmq.report.rows import TuneRow, WeightRow
from tests.llmq import classes
from tests.llmq.report.page.reports import chosen, mixed, noted, report
from tests.llmq.report.test_experts import tiny


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


def test_the_training_of_the_whole_model_is_told() -> None:
    made = report(3)
    assert not [line for line in printed(terminal.report, made) if "held-out" in line]
    made.recipe["methods"] = ["gptq", "distill"]
    made.tuned = TuneRow(0.05, 0.04, 20, 60, 1234, 5, 128, 9.0)
    (line,) = (line for line in printed(terminal.report, made, 400) if "held-out" in line)
    assert line.startswith("distill: 1,234 scales and 5 norms") and "0.0500 → 0.0400 at step 20 of 60: kept" in line


def test_the_choice_of_bits_is_the_last_line() -> None:
    line = printed(terminal.report, mixed(2), 400)[-1]
    assert line == f"bits: {chosen()}; {chosen().beside}" and "2.12 stored bits per weight, 0.4000 nats" in line
    alone = printed(terminal.report, mixed(2, chosen=chosen(uniform=())), 400)[-1]
    assert alone == f"bits: {chosen()}"
    assert not [line for line in printed(terminal.report, report(2)) if line.startswith("bits:")]


def printed(show: Callable[..., None], what: Any, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(console, what)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_experts_of_a_block_are_one_line() -> None:
    made = report(3, experts=128, routed=True)
    lines = printed(terminal.report, made)
    assert len(lines) < 40
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["block", "weights"])
    errors = sorted(row.error for row in made.quantized if row.block == 2 and row.expert is not None)
    cells = lines[at + 3].split()
    assert cells[:5] == ["2", "384", *(f"{digits(errors[i], 3)}{c}" for i, c in ((191, ","), (345, ","), (383, "")))]
    assert cells[5:] == ["0,", "189,", "381", "1", "of", "128", f"{100 * (made.blocks[2].routing or 0):.2f}", "%"]
    said = "\n".join(lines)
    worst = max(made.quantized, key=lambda row: row.error)
    assert f"largest errors: {worst.name} {worst.error:.2e}" in said
    first = "model.layers.0.mlp.experts.0"
    assert f"{first}.gate, {first}.up, {first}.down and 6 more: no token chose this expert" in said


def test_a_report_without_experts_has_no_table_of_them() -> None:
    assert not any("routing" in line for line in printed(terminal.report, report(2)))


def test_many_different_fallbacks_are_counted() -> None:
    made = report(6)
    made.weights = [noted(row, f"note {i}") for i, row in enumerate(made.quantized)]
    lines = printed(terminal.report, made)
    told = [line for line in lines if ": note " in line]
    more = len(made.weights) - terminal.NOTES
    assert len(told) == terminal.NOTES and f"{more} more weights: other fallbacks: report.json has them" in lines


def test_a_plan_has_a_row_for_the_experts_of_each_block(tmp_path: Path) -> None:
    source = tiny(tmp_path / "m", num_experts=4)
    ids = torch.arange(16).view(1, 16)
    made = job.plan(str(source), Recipe(methods=("rtn",), scheme=Scheme(4, 16)), ids=ids)
    lines = printed(terminal.plan, made, 160)
    at = next(i for i, line in enumerate(lines) if line.startswith("model.layers.0.mlp.experts × 4: 12 weights"))
    assert "4-bit g16 symmetric" in lines[at] and not any("experts.0" in line for line in lines)
    after = sum(item.after for item in made.weights if item.expert is not None and item.block == 0)
    assert size(after) in lines[at]
    # In their block, before what is outside of all blocks.
    assert at < next(i for i, line in enumerate(lines) if line.startswith("model.layers.1.self_attn"))


def test_an_inspection_has_a_line_for_the_experts_of_each_block(tmp_path: Path) -> None:
    found = inspect_folder(tiny(tmp_path / "m", num_experts=4))
    lines = printed(terminal.inspection, found, 160)
    (line,) = [line for line in lines if line.startswith("model.layers.1.mlp.experts")]
    weights = [row for row in found.rows if "layers.1.mlp.experts" in row.name]
    assert line.startswith("model.layers.1.mlp.experts × 4: 12 weights") and size(12 * 64 * 32 * 4) in line
    assert len(weights) == 12 and "64×32, 32×64" in line and "float32" in line
    changed = [replace(row, kind="int", bits=4, group=16, symmetric=True, error=0.1) if "up" in row.name else row
               for row in found.rows]  # fmt: skip
    changed = [replace(row, kind=UNKNOWN, shape=()) if row.name.endswith("1.mlp.experts.3.down_proj.weight") else row
               for row in changed]  # fmt: skip
    mixed = printed(terminal.inspection, replace(found, rows=tuple(changed)), 160)
    (line,) = [line for line in mixed if line.startswith("model.layers.1.mlp.experts")]
    assert "7 × float32, 4 × int4 g16, 1 × not understood" in line and "0.1000–0.1000" in line


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


def outside(made: Any, note: str = "") -> Any:
    """The report with two weights outside the blocks."""
    rows = [
        WeightRow(f"tower.{i}", (64, 64), None, 2048, Scheme(), 0.1 + 0.1 * i, (note,) * bool(note), 2.0)
        for i in (0, 1)
    ]
    made.weights = [*made.weights, *rows]
    return made


def test_weights_outside_the_blocks_are_a_line() -> None:
    lines = printed(terminal.report, outside(report(2), "no calibration: rounded to nearest"))
    (line,) = [line for line in lines if "outside the blocks" in line]
    assert line.replace("│", " ").split() == ["outside", "the", "blocks", "1.50e-01", "4.00", "4.0"]
    assert "tower.0, tower.1: no calibration: rounded to nearest" in lines
    assert not any("outside the blocks" in line for line in printed(terminal.report, report(2)))


def test_a_plan_says_what_has_no_calibration(tiny_model: Path, tmp_path: Path) -> None:
    ids = torch.arange(64).view(2, 32)
    made = job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32), include=("lm_head",)), ids=ids)
    said = "\n".join(printed(terminal.summary, made))
    assert "21 weights in 3 blocks and 1 weights outside the blocks to 4-bit g32" in said
    assert "outside the blocks none: rounded to nearest" in said
    plain = "\n".join(printed(terminal.summary, job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32)), ids=ids)))
    assert "21 weights in 3 blocks to 4-bit g32" in plain and "outside" not in plain
    folder = classes.write("bert", tmp_path)
    whole = job.plan(str(folder), Recipe(methods=("rtn",), scheme=Scheme(4, 32), model_class="AutoModel"))
    said = "\n".join(printed(terminal.plan, whole))
    assert "13 weights of BertModel to 4-bit g32" in said and "outside" not in said
