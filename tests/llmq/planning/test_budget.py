"""The memory of a plan: what each block loads at once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from llmq import job
from llmq.grids.scheme import Scheme
from llmq.planning import budget
from llmq.planning.memory import TRANSIENT, Load
from llmq.recipe.recipe import Recipe
from tests.llmq import classes
from tests.llmq.planning.made import make


class Wide:
    """A statistic of a known size."""

    size = 0

    def __init__(self, width: int, device: torch.device) -> None: ...

    def update(self, x: torch.Tensor) -> None: ...

    @classmethod
    def nbytes(cls, width: int) -> int:
        return cls.size * width


class Wider(Wide):
    """Another one."""

    size = 5_000


@pytest.mark.parametrize("part", ["transform", "quantize", "refine"])
def test_the_statistics_of_every_part_are_budgeted(
    part: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget has the largest pass of statistics: they are never held together."""
    made = make(tiny_model, methods=("smoothquant", "rtn", "signround"))
    made.pipeline.transforms[0].transform_needs = ()
    made.pipeline.quantizer.quantize_needs = ()
    loads: list[list[Load]] = []
    monkeypatch.setattr(budget, "predict", lambda *args, **more: loads.append(args[6]) or made.budget)
    budget.budget(made, "cpu")
    methods = {
        "transform": made.pipeline.transforms[0],
        "quantize": made.pipeline.quantizer,
        "refine": made.pipeline.refiners[0],
    }
    for one, method in methods.items():
        setattr(method, f"{one}_needs", (Wider,) if one == part else (Wide,))
    budget.budget(made, "cpu")
    widths = {item.input_id: item.shape[1] for item in made.blocks[0].weights.values()}
    assert [load.statistics for load in loads[0]] == [0, 0, 0]
    assert [load.statistics for load in loads[1]] == [5_000 * sum(widths.values())] * 3


def test_the_largest_weight_outside_the_blocks_counts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, rounded in float32, and written with others of its unit."""
    found: list[list[Load]] = []
    plain = make(tiny_model, methods=("rtn",))
    monkeypatch.setattr(budget, "predict", lambda *args, **more: found.append(args[6]) or plain.budget)
    plan = make(tiny_model, methods=("rtn",), include=("lm_head",))
    budget.budget(plan, "cpu")
    (*blocks, last) = found[-1]
    assert len(blocks) == len(plan.blocks) == 3
    assert last.block == 256 * 64 * (plan.dtype.itemsize + 4) and last.packed == plan.source.total_bytes
    assert last.statistics == 0 and last.workspace == plan.pipeline.data_free.workspace((256, 64))


def test_a_model_without_blocks_needs_its_largest_weight(tmp_path: Path) -> None:
    folder = classes.write("bert", tmp_path)
    plan = job.plan(str(folder), Recipe(methods=("hqq",), scheme=Scheme(4, 32), model_class="AutoModel"))
    largest = 64 * 128
    wanted = largest * (4 + 4) + plan.source.total_bytes + plan.pipeline.data_free.workspace((64, 128))
    need = plan.budget.memory - TRANSIENT - psutil.Process().memory_info().rss
    assert abs(need - wanted) < 2**25 and plan.budget.device_memory == 0
    assert plan.budget.disk < plan.source.total_bytes
    assert budget.budget(plan, "cuda").device_memory == wanted


@pytest.mark.parametrize("method", ["signround", "block_qat"])
def test_what_a_refinement_learns_at_once_is_budgeted_at_once(
    method: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tiny_model, methods=(method,), options={"last": "output"})
    loads: list[list[Load]] = []
    monkeypatch.setattr(budget, "predict", lambda *args, **more: loads.append(args[6]) or made.budget)
    budget.budget(made, "cpu")
    (refiner,) = made.pipeline.refiners
    wanted = sum(refiner.workspace(weight.shape) for weight in made.blocks[0].weights.values())
    assert [load.workspace for load in loads[0]] == [wanted] * 3
