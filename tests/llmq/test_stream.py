"""The loop: what is verified after writing, what is refused on the way, what is kept of a tied head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import llmq
from llmq import steps
from llmq.block.block import Block, WeightState
from llmq.block_io import BlockIO
from llmq.grids.scheme import Scheme
from llmq.machine import device_memory
from llmq.methods import Pipeline
from llmq.planning.plan import BlockPlan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.conftest import write_tiny_model
from tests.llmq.refusal import refused

IDS = torch.randint(256, (3, 64), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(scheme=Scheme(4, 32))


def test_a_weight_read_back_wrong_is_noticed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BlockIO.restore

    def wrong(io: BlockIO, block: BlockPlan) -> list[WeightState]:
        states = real(io, block)
        if block.index == 2:
            block.module.get_parameter("mlp.down_proj.weight").data[1:] = 0
        return states

    monkeypatch.setattr(BlockIO, "restore", wrong)
    refused(lambda: llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS), "layers.2", "read back")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_output_that_overflows_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.quantize
    seen = []

    def huge(block: Block, pipeline: Pipeline) -> None:
        real(block, pipeline)
        seen.append(block)
        if len(seen) == 2:
            block.module.get_parameter("mlp.up_proj.weight").data.fill_(float("inf"))

    monkeypatch.setattr(steps, "quantize", huge)
    refused(lambda: llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS), "layers.1", "after quantization")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_source_dtype(dtype: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", dtype=dtype, shard="100KB")
    report = llmq.quantize(str(model), tmp_path / "out", RECIPE, ids=IDS)
    assert len(report.weights) == 23 and not report.fallbacks
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with safe_open(tmp_path / "out" / index[name], "pt") as shard:
        assert shard.get_tensor(name).dtype == getattr(torch, dtype)


def test_everything_is_in_the_report(tiny_model: Path, tmp_path: Path) -> None:
    report = llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["name"] for row in written["weights"]} == {row.name for row in report.weights}
    for row in written["weights"]:
        assert row["reason"]["sentence"] if "reason" in row else 0 < row["error"] < 0.3
    assert Report.load(tmp_path / "out") == report
    assert all(0 < block["error"] < 0.5 for block in written["blocks"])
    assert written["peak_memory"] > 0 and written["bits_per_weight"] == pytest.approx(report.bits_per_weight)


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted anew from call to call; a host has none."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append("most") or 1 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    assert device_memory(torch.device("cpu")) is None and not asked
    assert device_memory(torch.device("cuda:0")) == 1 << 30 and asked == ["most", "reset"]
