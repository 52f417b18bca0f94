"""The plan: what becomes of each weight, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.planning import plan as plan_module
from llmq.planning.memory import Load
from tests.llmq.planning.made import make


def test_everything_is_accounted_for(tiny_model: Path) -> None:
    plan = make(tiny_model)
    assert {i.name for i in plan.weights if i.scheme} == {
        f"model.layers.{layer}.{part}"
        for layer in range(3)
        for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
    assert {i.name: str(i.reason) for i in plan.weights if not i.scheme} == {
        "model.embed_tokens": "outside the decoder blocks",
        "lm_head": "outside the decoder blocks",
    }
    assert sum(i.before for i in plan.weights) <= plan.source.total_bytes
    assert plan.bits_per_weight == pytest.approx(4 + 32 / 32 + 128 / (64 * 64), abs=0.05)  # float32 scales, the shapes


def test_rtn_needs_no_text(tiny_model: Path) -> None:
    assert "none needed" in make(tiny_model, methods=("rtn",)).calibration.description
    assert (
        "none needed" not in make(tiny_model, methods=("rtn",), options={"range": "weighted"}).calibration.description
    )


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
    monkeypatch.setattr(plan_module, "predict", lambda *args, **more: loads.append(args[6]) or made.budget)
    plan_module._budget(made, "cpu")
    methods = {
        "transform": made.pipeline.transforms[0],
        "quantize": made.pipeline.quantizer,
        "refine": made.pipeline.refiners[0],
    }
    for one, method in methods.items():
        setattr(method, f"{one}_needs", (Wider,) if one == part else (Wide,))
    plan_module._budget(made, "cpu")
    widths = {item.input_id: item.shape[1] for item in made.blocks[0].weights.values()}
    assert [load.statistics for load in loads[0]] == [0, 0, 0]
    assert [load.statistics for load in loads[1]] == [5_000 * sum(widths.values())] * 3
