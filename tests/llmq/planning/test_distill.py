"""What a plan says of a method that tunes the whole model: its memory. What it refuses: tests/llmq/training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq import job, ranks
from llmq.grids.scheme import Scheme
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from tests.conftest import write_tiny_model

IDS = torch.zeros(40, 64, dtype=torch.long)


def plan(model: Path, methods: str = "rtn+distill", windows: int = 40, **options: int) -> Plan:
    recipe = Recipe(methods=tuple(methods.split("+")), scheme=Scheme(4, 32), options=options)
    return job.plan(str(model), recipe, ids=IDS[:1].expand(windows, -1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "m", hidden_size=256, intermediate_size=2048)


def test_its_memory_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself grows from plan to plan, so only differences that are larger count.

    Of several ranks, each runs its share of a step.
    """
    without, with_it = plan(model, "rtn").budget, plan(model).budget
    assert with_it.memory > without.memory + 20 * 2**20 and with_it.disk == without.disk
    more = plan(model, windows=4000).budget
    # What the first block gets, and the unquantized model's last states.
    assert more.memory - with_it.memory > 2 * 3960 * 64 * 256 * 4
    many = plan(model, minibatch=20_000).budget
    assert many.memory - with_it.memory > 5 * 19_000 * 64 * 256 * 4
    monkeypatch.setattr(ranks._group, "size", 4)
    monkeypatch.setattr(ranks, "everyone", lambda value: [value])
    assert many.memory - plan(model, minibatch=20_000).budget.memory > 3 * 19_000 * 64 * 256 * 4
