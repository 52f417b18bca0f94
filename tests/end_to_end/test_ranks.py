"""Several ranks write the bytes of one process, also when one of them is killed and fewer go on."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llmq
from llmq import ranks
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.report.rows import WeightRow
from llmq.watch import Silent
from tests.conftest import write_tiny_model, write_tokenizer
from tests.end_to_end.test_resume import digests
from tests.llmq import mixtures
from tests.stages import AtStep
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


class KillingIn(AtStep):
    """Kills rank 1."""

    def reached(self) -> None:
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def distilled(text: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Six batches, of which five are trained on: a step of three of them may have one twice."""
    monkeypatch.setattr("llmq.planning.types.BATCH_TOKENS", 64)
    options = {"steps": 12, "learning_rate": 0.02, "minibatch": 6}
    calibration = {"text": str(text), "samples": 12, "seqlen": 32}
    scheme = {"bits": 2, "group_size": 32}
    made = {"methods": "rtn+distill", "scheme": scheme, "calibration": calibration, "options": options}
    return Recipe.from_dict(made, "recipe")


def test_ranks_distill_and_fewer_go_on(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it trains, and while what was trained is written; four ranks, of which the last has no batch."""
    model = str(write_tiny_model(tmp_path / "model", layers=2, dtype="bfloat16"))
    chosen, out = distilled(text_file, monkeypatch), tmp_path / "out"
    whole = llmq.quantize(model, tmp_path / "whole", chosen)
    assert whole.tuned is not None and whole.tuned.kept
    norms = {n: t for file in (tmp_path / "whole").glob("*.safetensors") for n, t in load_file(file).items()}
    moved = [name for name, value in norms.items() if name.endswith("norm.weight") and not bool((value == 1).all())]
    assert len(moved) == 5
    assert together(4, lambda: llmq.quantize(model, tmp_path / "four", chosen) and None) == [None] * 4
    assert digests(tmp_path / "four") == digests(tmp_path / "whole")
    for count, stage, at in ((3, "Distilling", 11), (2, "Writing scales", 2)):
        watch = KillingIn(stage, at)
        lost, killed, *_ = together(count, lambda watch=watch: llmq.quantize(model, out, chosen, watch=watch) and None)  # type: ignore[misc]
        assert isinstance(lost, ranks.Lost) and killed is None
    broken = shutil.copytree(out, tmp_path / "broken")
    shutil.rmtree(broken / ".llmq" / "distilled")
    found = together(2, lambda: llmq.quantize(model, broken, chosen) and None)
    assert all(isinstance(one, ranks.Common) and "what was trained any more: delete" in str(one) for one in found)
    report = llmq.quantize(model, out, chosen)
    assert digests(out) == digests(tmp_path / "whole") and not (out / ".llmq" / "distilled").exists()
    for one in (report, Report.load(tmp_path / "four")):
        assert one.tuned is not None
        assert replace(one.tuned, seconds=0) == replace(whole.tuned, seconds=0)
