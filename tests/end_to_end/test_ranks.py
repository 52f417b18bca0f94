"""Several ranks write the bytes of one process, also when one of them is killed and fewer go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import llmq
from llmq import ranks
from llmq.errors import LlmqError
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.report.rows import WeightRow
from llmq.watch import Silent
from tests.conftest import write_tiny_model, write_tokenizer
from tests.end_to_end.test_resume import digests
from tests.llmq import mixtures
from tests.together import together


class Killing(Silent):
    """A watch that kills rank 1 when the first block is done."""

    def step(self, text: str) -> None:
        if text.startswith("block 0:") and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def recipe(text: Path, methods: str, **options: object) -> Recipe:
    calibration = {"text": str(text), "samples": 21, "seqlen": 250}
    return Recipe.from_dict(
        {"methods": methods, "scheme": {"group_size": 32}, "calibration": calibration, "options": options}, "recipe"
    )


def test_a_rank_is_killed_and_fewer_go_on(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the rows of each weight."""
    monkeypatch.setattr("llmq.grids.base.ROWS", 16)
    model, chosen = (
        write_tiny_model(tmp_path / "model", layers=2, hidden_size=32, intermediate_size=64),
        recipe(text_file, "gptq", sweeps=0),
    )
    llmq.quantize(str(model), tmp_path / "whole", chosen)
    out = tmp_path / "out"

    def work() -> object:
        return llmq.quantize(str(model), out, chosen, watch=Killing()) and None

    lost, killed, _ = together(3, work)
    assert isinstance(lost, ranks.Lost) and killed is None
    assert (out / ".llmq" / "journal.jsonl").read_text().count('"block 0"') == 1
    assert together(2, lambda: llmq.quantize(str(model), out, chosen) and None) == [None, None]
    assert digests(out) == digests(tmp_path / "whole")


def test_experts_and_what_is_learned_have_the_same_bytes(tmp_path: Path, text_file: Path) -> None:
    model = mixtures.write("qwen3_moe", tmp_path / "model", num_experts=5, num_hidden_layers=1)
    write_tokenizer(model)
    chosen = recipe(text_file, "gptq+signround", sweeps=0, iterations=2)
    whole = llmq.quantize(str(model), tmp_path / "whole", chosen)
    assert together(2, lambda: llmq.quantize(str(model), tmp_path / "out", chosen) and None) == [None, None]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    found = Report.load(tmp_path / "out")
    assert errors(found) == errors(whole) and all(error != 0 for error in errors(found))


def errors(report: Report) -> list[float]:
    """Of all quantized weights."""
    return [row.error for row in report.weights if isinstance(row, WeightRow) and row.error is not None]


def test_what_one_process_does_is_refused(tmp_path: Path, text_file: Path, tiny_model: Path) -> None:
    chosen = recipe(text_file, "gptq+distill")
    found = together(2, lambda: llmq.plan(str(tiny_model), chosen) and None)
    assert all(isinstance(one, LlmqError) and "distill does not work with several ranks" in str(one) for one in found)
