"""Blocks as wide as those of models in use: a run takes the memory that its plan says, and quantizes all weights.

Weights are random, one block of each; the tiny models of other tests have the same code, but no memory to speak of.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoConfig

import llmq
from llmq.formats.inspection import inspect_folder
from llmq.planning.budget import budget
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.report.rows import KeptRow, WeightRow
from llmq.spill import Saving
from tests.forked import Server

pytestmark = pytest.mark.slow(15)
GIB = 2**30
BASE = 0.5 * GIB
"""A process that has imported everything."""
DEEPSEEK = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a random model: make(out, shape, layers, changes)."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent.parent / "scripts"))
    return importlib.import_module("make_random_model").make


def quantized(model: Path, out: Path, forked: Server) -> Report:
    """The report of a run in a process of its own, which reads the block back; nothing is left of the model."""
    done = forked.run("quantize", model, "-o", out, "--method", "rtn", "--range", "minmax")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    shutil.rmtree(model)
    found = Report.load(out)
    assert found.predicted_memory == pytest.approx(found.peak_memory, rel=0.15)
    config = AutoConfig.from_pretrained(out)
    assert config.quantization_config["quant_method"] == "compressed-tensors"
    return found


def test_a_block_of_7b(tmp_path: Path, make: Any, forked: Server) -> None:
    make(tmp_path / "model", "llama-2-7b", 1, {"vocab_size": 3000})
    out = tmp_path / "out"
    report = quantized(tmp_path / "model", out, forked)
    shapes = sorted(row.shape for row in report.weights if isinstance(row, WeightRow))
    assert shapes == [(4096, 4096)] * 4 + [(4096, 11008)] + [(11008, 4096)] * 2
    # Codes of 4 bits and a scale of 16 for each group of 128; both embeddings in 16 bits.
    inside, outside = 4 * 4096 * 4096 + 3 * 4096 * 11008, 2 * 3000 * 4096
    expected = (inside * (4 + 16 / 128) + outside * 16) / (inside + outside)
    assert inspect_folder(out).bits_per_weight == pytest.approx(expected, rel=1e-3)
    shutil.rmtree(out)


def test_a_block_of_deepseek_v3(tmp_path: Path, make: Any, forked: Server) -> None:
    """Latent attention, routed experts and the shared one: everything but the router, which has few outputs."""
    make(tmp_path / "model", "deepseek-v3", 1, {"vocab_size": 3000} | DEEPSEEK)
    report = quantized(tmp_path / "model", tmp_path / "out", forked)
    rows = {row.name.removeprefix("model.layers.0."): row for row in report.weights}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    experts = ("experts.0", "experts.1", "shared_experts")
    wanted = {f"self_attn.{name}" for name in attention}
    wanted |= {f"mlp.{of}.{name}_proj" for of in experts for name in ("gate", "up", "down")}
    assert {name for name, row in rows.items() if isinstance(row, WeightRow)} == wanted
    kept = {name for name, row in rows.items() if isinstance(row, KeptRow)}
    assert kept == {"mlp.gate", "model.embed_tokens", "lm_head"}
    assert rows["self_attn.kv_b_proj"].shape == (128 * (128 + 128), 512)
    shutil.rmtree(tmp_path / "out")


def test_the_plan_of_all_of_70b(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what a run of one block took (docs/benchmarks.md), since a run takes half an hour."""
    make(tmp_path / "model", "llama-3-70b", empty=True)
    machine = SimpleNamespace(**psutil.virtual_memory()._asdict() | {"available": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    recipe = Recipe.from_dict({"methods": "gptq", "calibration": {"samples": 8, "seqlen": 512}}, "recipe")
    own = psutil.Process().memory_info().rss
    plan = llmq.plan(str(tmp_path / "model"), recipe, max_memory=int(9 * GIB - BASE + own))
    assert plan.saving is Saving.PASSES and len(plan.blocks) == 80
    assert all(weight.scheme is not None for block in plan.blocks for weight in block.weights.values())
    for found, measured in ((plan.budget, 6.53), (budget(plan, "cpu"), 13.57)):
        assert found.memory - own + BASE == pytest.approx(measured * GIB, rel=0.15)
