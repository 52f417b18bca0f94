"""A report: read back as it was written, made of a plan and a journal, and refused by name where it is none."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import job
from llmq.block.attempt import Outcome
from llmq.checkpoint.files import REPORT
from llmq.discovery.reasons import Kind
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.report.report import VERSIONS, Report, make_report, versions
from llmq.report.rows import WeightRow
from tests.conftest import write_tiny_model
from tests.llmq.refusal import refused
from tests.llmq.report.page.reports import report


def test_a_report_is_read_back(tmp_path: Path) -> None:
    made = report(3)
    (tmp_path / REPORT).write_text(made.to_json())
    read = Report.load(tmp_path)
    assert read == made
    assert [row.name for row in read.kept] == ["model.layers.0.attn.value", "head"]
    assert len(read.quantized) == 20 and read.fallbacks == [("model.layers.0.attn.out", "damped 10 times more")]
    assert [attempt.method for _, attempt in read.attempts(Outcome.UNDONE)] == ["awq"] * 3
    assert read.attempts(Outcome.SKIPPED) == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"weights": [{}], "blocks": []}', '{"weights": 1, "blocks": []}', "{"])
def test_what_is_no_report_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(text)
    refused(lambda: Report.load(tmp_path), str(tmp_path / REPORT), "cannot be read as a report")


def test_a_folder_without_one_is_told_from_one_with_one(tmp_path: Path) -> None:
    assert not Report.there(tmp_path)
    refused(lambda: Report.load(tmp_path), str(tmp_path / REPORT), "cannot be read as a report")
    (tmp_path / REPORT).mkdir()
    assert not Report.there(tmp_path)
    (tmp_path / REPORT).rmdir()
    (tmp_path / REPORT).write_text("{}")
    assert Report.there(tmp_path)


def test_a_report_of_an_earlier_llmq_lacks_what_came_later(tmp_path: Path) -> None:
    data = json.loads(report(1).to_json())
    later = {"format", "predicted_device_memory", "loaders", "examples", "command", "versions"}
    read = Report.from_dict({key: value for key, value in data.items() if key not in later})
    assert (read.format, read.predicted_device_memory, read.loaders, read.command, read.versions) == ("", 0, [], "", {})
    del data["seconds"]
    (tmp_path / REPORT).write_text(json.dumps(data))
    refused(lambda: Report.load(tmp_path), "cannot be read as a report", "seconds")


def test_the_text_is_the_same_for_the_same_report() -> None:
    text = report(2).to_json()
    assert text == report(2).to_json() and text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_how_much_smaller_it_is() -> None:
    assert report(1, source_bytes=300, bytes=100).ratio == 3
    assert report(1, source_bytes=300, bytes=0).ratio == 300


def test_attempts_by_outcome() -> None:
    made = report(3)
    assert [name for name, _ in made.attempts(Outcome.KEPT)] == [f"model.layers.{i}" for i in range(3)]
    assert len(made.attempts(Outcome.KEPT, Outcome.UNDONE)) == 6 and made.attempts() == []


def test_versions_are_those_installed() -> None:
    found = versions()
    assert set(found) == {*VERSIONS, "python"}
    assert found["torch"] == version("torch") and found["python"].count(".") == 2


def journal(names: list[str]) -> dict[str, Any]:
    """What a run notes of two blocks with these weights each."""
    scheme = {"bits": 4, "group_size": 32, "symmetric": True, "grid": "int"}
    rows = [{"name": n, "shape": [64, 64], "bytes": 9, "scheme": scheme, "error": 0.1, "notes": [n]} for n in names]
    return {f"block {i}": {"error": i + 0.5, "seconds": 2.0, "weights": rows[i : i + 1]} for i in (1, 0)}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_it_is_made_of_the_plan_and_the_journal(dtype: str, size: int, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", layers=2, dtype=dtype)
    recipe = Recipe(scheme=Scheme(4, 32), keep=("q_proj",), loader="transformers")
    plan = job.plan(str(model), recipe, ids=torch.arange(64).view(2, 32))
    plan.warnings = ["a warning"]
    made = make_report(plan, "m", tmp_path / "o", journal(["x", "y"]), 1.239, 1000, "again")
    assert [(row.name, row.block) for row in made.weights if isinstance(row, WeightRow)] == [("x", 0), ("y", 1)]
    assert [(row.name, row.error) for row in made.blocks] == [("model.layers.0", 0.5), ("model.layers.1", 1.5)]
    assert made.fallbacks == [("x", "x"), ("y", "y")]
    assert {(row.name, row.block, row.reason.kind) for row in made.kept} == {
        ("model.layers.0.self_attn.q_proj", 0, Kind.BY_USER),
        ("model.layers.1.self_attn.q_proj", 1, Kind.BY_USER),
        ("model.embed_tokens", None, Kind.OUTSIDE),
        ("lm_head", None, Kind.OUTSIDE),
    }
    # All that was written, in bits, over all the numbers of the source.
    assert made.bits_per_weight_whole == pytest.approx(8 * 1000 / (plan.source.total_bytes / size))
    assert made.bits_per_weight == plan.bits_per_weight and made.source_bytes == plan.source.total_bytes
    assert (made.model, made.out, made.bytes, made.seconds) == ("m", str(tmp_path / "o"), 1000, 1.24)
    assert (made.command, made.warnings, made.recipe) == ("again", ["a warning"], recipe.to_dict())
    assert made.format == "compressed-tensors pack-quantized" and any("vLLM" in line for line in made.loaders)
    assert made.predicted_memory == plan.budget.memory and made.peak_memory > 0 and made.versions == versions()
    assert Report.from_dict(json.loads(made.to_json())) == made


def test_a_block_that_the_journal_lacks_is_no_report(tiny_model: Path, tmp_path: Path) -> None:
    plan = job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32)), ids=torch.arange(64).view(2, 32))
    with pytest.raises(KeyError, match="block 2"):
        make_report(plan, "m", tmp_path, journal(["x", "y"]), 1.0, 1)


def test_weights_outside_the_blocks_come_after_those_inside(tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(scheme=Scheme(4, 32), include=("lm_head",))
    plan = job.plan(str(tiny_model), recipe, ids=torch.arange(64).view(2, 32))
    scheme = {"bits": 4, "group_size": 32, "symmetric": True, "grid": "int"}
    row = {"name": "lm_head", "shape": [256, 64], "block": None, "bytes": 9, "scheme": scheme, "error": 0.1}
    blocks = {f"block {i}": {"error": 0.5, "seconds": 2.0, "weights": []} for i in range(3)}
    made = make_report(plan, "m", tmp_path / "o", {"rest 0": {"weights": [row]}, "rest 1": {}} | blocks, 1.0, 1000)
    assert [(row.name, row.block) for row in made.quantized] == [("lm_head", None)]
    assert made.opener == "AutoModelForCausalLM" and len(made.blocks) == 3
