"""The memory of a plan: what each block loads at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.planning import budget
from llmq.planning.memory import Load
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
