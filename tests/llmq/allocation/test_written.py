"""What a written folder lost, streamed, against both models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmq
from llmq import job
from llmq.allocation import allocate, written
from llmq.checkpoint.sink import Sink
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.streaming.block_io import rest
from llmq.watch import Silent
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CPU, ids


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_divergence_of_a_folder(kind: str, tmp_path: Path) -> None:
    tiny.make(kind, tmp_path / "m")
    recipe = Recipe(("rtn",), Scheme(3, 16), include=("lm_head",) if kind == "llama" else ())
    llmq.quantize(str(tmp_path / "m"), tmp_path / "out", recipe, ids=ids())
    auto: Any = AutoModelForCausalLM
    base, stock = (auto.from_pretrained(tmp_path / f, dtype=torch.float32).eval() for f in ("m", "out"))
    with torch.no_grad():
        want, have = (model(ids()).logits.log_softmax(-1) for model in (base, stock))
    expected = float((want.exp() * (want - have)).sum(-1).mean())
    plan = job.plan(str(tmp_path / "m"), recipe, ids=ids())
    units = len(rest(plan)) + sum(len(block.units) for block in plan.blocks)
    with Sink.open(tmp_path / "out", job.fingerprint(plan, "cpu"), units=units) as sink:
        found = written.divergence(allocate.widened(plan), sink, torch.split(ids(), 2), CPU, Silent())
    assert found == pytest.approx(expected, rel=5e-3)
