"""Scores: what each candidate scheme of each group of weights costs in loss. One file each, found by its name.

A score is a module with a docstring, whose first line says what it is, and a function

    def losses(task: Scoring) -> list[list[float]]

that returns, for each group of the task and each of its candidates, the predicted divergence in nats that rounding this
group alone causes: ≥ 0, and 0 for `None`, the unquantized weights. What it reads, it reads one block at a time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from llmq.allocation.groups import Group
from llmq.errors import LlmqError
from llmq.methods.base import Method
from llmq.planning.plan import Plan
from llmq.watch import Watch


@dataclass(frozen=True)
class Scoring:
    """What a score works with.

    plan: of the recipe, in float32, so that small divergences are not lost in the model's own rounding; batches: token
    ids [windows, tokens]; judged: how many of them, the last ones, losses are measured on, where a score measures any:
    they are not used for statistics; quantizer: rounds weights, without corrections; scale_dtype: of stored scales;
    folder: for what a killed score goes on from.
    """

    plan: Plan
    groups: Sequence[Group]
    quantizer: Method
    batches: Sequence[Tensor]
    judged: int
    scale_dtype: torch.dtype
    device: torch.device
    watch: Watch
    folder: Path | None = None


def names() -> list[str]:
    """The names of all scores."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Callable[[Scoring], list[list[float]]]:
    """A score by its name. Raises LlmqError with all names."""
    if name not in names():
        raise LlmqError(f"score {name!r} is not known: choose from {', '.join(names())}")
    return cast(Callable[[Scoring], list[list[float]]], importlib.import_module(f"{__name__}.{name}").losses)
