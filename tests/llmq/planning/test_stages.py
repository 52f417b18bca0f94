"""The memory of weights that are quantized stage by stage, counted by hand, and how a plan comes to fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmq import job
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning import stages
from llmq.planning.budget import budget
from llmq.planning.memory import Load
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from llmq.report.terminal import told_saving
from llmq.spill import Saving
from tests.llmq.planning.made import IDS, make

WIDE = 512
"""The width of what has many inputs: its matrices are most of what there is."""


@pytest.fixture(scope="module")
def plan(tiny_model: Path) -> Plan:
    return make(tiny_model, methods=("gptq",))


@pytest.fixture
def wide(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A weight of 64 outputs, added to the stream, of an input that is much wider than all else."""
    monkeypatch.setattr(stages, "hidden_width", lambda model: 64)
    return [SimpleNamespace(shape=(64, WIDE), input_id=3, after=64 * WIDE // 2, scheme=Scheme(4, 32))]


def test_a_stage_that_is_corrected(plan: Plan, wide: list[Any]) -> None:
    """What is there at once while it is corrected: the Hessian, a factor, and the sums of its outputs and streams, or
    what two pieces of it take."""
    square, matrix = 4 * WIDE**2, 4 * 64 * WIDE
    load = stages.corrected(plan, wide, Load(1000, 0, 0, 0), Saving.STATES, "cpu")
    (stage,) = stages._stages(plan, wide)
    assert stage.direct and stage.sums == square and stage.drift == stage.streams == matrix
    factoring = 2 * square + 2 * matrix + stage.held
    collecting = square + 2 * matrix + stage.held + stage.batch
    rounding = square + matrix + stages.taken(plan.pipeline.quantizer, wide[0], "cpu")
    assert load.workspace == max(factoring, collecting, 2 * square + 3 * matrix, rounding) + 64 * WIDE
    assert load.block == 1000 and load.statistics == 0


def test_a_stage_with_a_drift(plan: Plan, wide: list[Any]) -> None:
    """With more outputs there is a drift, and what becomes of it, and some rows of the weight."""
    wide[0].shape = (WIDE // 2 + 1, WIDE)
    square, matrix = 4 * WIDE**2, 4 * WIDE * (WIDE // 2 + 1)
    load = stages.corrected(plan, wide, Load(1000, 0, 0, 0), Saving.STATES, "cpu")
    (stage,) = stages._stages(plan, wide)
    assert stage.narrow and not stage.direct and stage.sums == stage.drift == square
    multiplying = 2 * square + 2 * matrix + stage.held
    assert load.workspace >= max(multiplying, 2 * square + stage.held + stage.batch)


def test_one_piece_of_what_is_rounded_in_pieces_counts(
    plan: Plan, wide: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (item,), method = wide, plan.pipeline.quantizer
    whole = stages.taken(method, item, "cpu")
    monkeypatch.setattr("llmq.grids.base.ROWS", 16)
    square, codes = 4 * WIDE**2, 64 * WIDE
    assert stages.taken(method, item, "cpu") == square + 5 * 16 * WIDE + 2 * codes < whole
    assert stages.taken(method, item, "cuda") == whole == square + 5 * codes
    assert stages.taken(method, item, "cpu", 9 * square) == 9 * square + 18 * 16 * WIDE + 2 * codes
    item.scheme = Scheme(4, 16, grid="nvfp4")
    assert stages.taken(method, item, "cpu") == whole


def test_what_is_kept_counts_until_it_is_not(plan: Plan) -> None:
    items = [*plan.blocks[0].weights.values()]
    none, products, states = (stages.corrected(plan, items, Load(0, 0, 0, 0), level, "cpu") for level in [*Saving][:3])
    tokens = plan.ids.numel() * plan.dtype.itemsize
    widths = {item.input_id: item.shape[1] for item in items}
    # Of the weights with as many outputs as hidden states are wide, two are alone with their input.
    shown = tokens * (sum(widths.values()) + 2 * 64)
    assert none.statistics - products.statistics == tokens * (sum(item.shape[0] for item in items) + 64)
    assert products.statistics - states.statistics == shown
    assert stages.in_files(plan, items, Saving.PRODUCTS) == 0
    assert stages.in_files(plan, items, Saving.STATES) == shown


def test_what_is_shown_is_kept_up_to_a_limit(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of all stages, and streams of weights that are alone with their input; nothing is if it is too much."""
    items = [*plan.blocks[0].weights.values()]
    tokens = plan.ids.numel() * plan.dtype.itemsize
    inputs = tokens * sum({item.input_id: item.shape[1] for item in items}.values())
    every = inputs + tokens * 2 * 64
    for room, kept in ((every, every), (every - 1, 0), (inputs, 0), (10 * inputs, every)):
        monkeypatch.setattr(stages, "ROOM", room)
        assert stages._shown(plan, items) == kept


def test_a_stage_that_rests(plan: Plan, wide: list[Any]) -> None:
    """Of two square matrices one is in memory; the block is while it runs."""
    square, matrix, block = 4 * WIDE**2, 4 * 64 * WIDE, 1000
    (stage,) = stages._stages(plan, wide)
    load = stages.resting(plan, wide, Load(5000, 10, 20, 30), block)
    most = max(block + stage.held + square + stage.batch, square + matrix + 18 * 64 * WIDE)
    assert load == Load(block, 10, 0, most - block - 10)
    assert most < 2 * square
    assert stages.in_files(plan, wide, Saving.PASSES) > square + 2 * matrix


def test_passes(tiny_model: Path, plan: Plan) -> None:
    assert stages.most_passes(plan) == 2
    assert stages.most_passes(make(tiny_model, methods=("rtn",))) == 1
    plain = make(tiny_model, methods=("gptq",), options={"correct": "none"})
    widths = {item.input_id: item.shape[1] ** 2 for item in plain.blocks[0].weights.values()}
    assert 1 < stages.most_passes(plain) == -(-sum(widths.values()) // max(widths.values()))


def test_a_plan_does_no_more_than_it_has_to(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that fits is chosen; what does not fit at all is refused, with a limit that is enough."""
    recipe = Recipe(methods=("gptq",), scheme=Scheme(4, 32))
    ids = IDS.repeat(64, 8)
    made = job.plan(str(tiny_model), recipe, ids=ids)
    assert made.saving is Saving.NONE and made.budget.files == 0
    need = [budget(made, "cpu", None, level).memory for level in Saving]
    assert need == sorted(need, reverse=True) and need[3] < need[0]
    # The process itself is not the same size at every look.
    monkeypatch.setattr("llmq.planning.memory.psutil.Process", lambda: SimpleNamespace(memory_info=_resident))
    need = [budget(made, "cpu", None, level).memory for level in Saving]
    for level, most in zip(Saving, need, strict=True):
        found = job.plan(str(tiny_model), recipe, ids=ids, max_memory=most)
        assert found.budget.memory <= most and found.saving <= level
        assert (found.budget.files > 0) == (found.saving >= Saving.STATES)
    assert found.saving is Saving.PASSES and "in up to 2 passes" in told_saving(found)
    with pytest.raises(LlmqError, match=r"needs at least about .* --max-memory 1.25GiB") as refused:
        job.plan(str(tiny_model), recipe, ids=ids, max_memory=need[3] // 2)
    assert "--samples" in str(refused.value)
    job.plan(str(tiny_model), recipe, ids=ids, max_memory=5 * 2**28)


def _resident() -> SimpleNamespace:
    return SimpleNamespace(rss=2**30)
