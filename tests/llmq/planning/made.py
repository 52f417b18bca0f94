"""Plans of tiny models, for the tests of what a plan decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmq import job
from llmq.grids.scheme import Scheme
from llmq.planning.plan import Plan
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe

IDS = torch.arange(64).view(2, 32)
ANY = "model.layers.1.mlp.down_proj"


def make(model: Path, bits: int = 4, group: int | None = 32, tp: int = 1, **recipe: Any) -> Plan:
    return job.plan(str(model), Recipe(scheme=Scheme(bits, group), **recipe), ids=IDS, tp=tp)


def scheme_of(plan: Plan, name: str = ANY) -> Scheme | None:
    return next(item.scheme for item in plan.weights if item.name == name)


def item(name: str, shape: tuple[int, int] = (64, 64), scheme: Scheme | None = None, **more: Any) -> WeightPlan:
    """A weight of a plan by hand: of block 0, where nothing else is told."""
    return WeightPlan(name, f"{name}.weight", shape, 0, 0, scheme, **{"block": 0} | more)
