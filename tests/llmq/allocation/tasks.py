"""Scoring tasks on tiny models, and what a whole model in memory says of the same choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq import job
from llmq.allocation import allocate
from llmq.allocation.groups import Group, groups_of
from llmq.allocation.scores import Scoring
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent, Watch

CPU = torch.device("cpu")
CANDIDATES = (Scheme(2, 16), Scheme(3, 16), Scheme(4, 16), Scheme(8, 16), None)


def ids(windows: int = 6, tokens: int = 32, seed: int = 0) -> Tensor:
    """Random token ids that tiny models know."""
    return torch.randint(3, 250, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def task(
    folder: Path,
    recipe: Recipe | None = None,
    *,
    candidates: Sequence[Scheme | None] = CANDIDATES,
    keep: Path | None = None,
    watch: Watch | None = None,
    quantizer: Method | None = None,
) -> Scoring:
    """A task of a folder's model: four windows for statistics, and two batches of one window judged."""
    plan = job.plan(str(folder), recipe or Recipe(("rtn",), Scheme(4, 16), loader="llmq"), ids=ids())
    groups = groups_of(plan.weights, plan.recipe, candidates, plan.dtype)
    scale_dtype, wide = plan.dtype, allocate.widened(plan)
    batches = [ids()[:4], ids()[4:5], ids()[5:]]
    how = quantizer or allocate.scorer(plan)
    return Scoring(wide, groups, how, batches, 2, scale_dtype, CPU, watch or Silent(), keep)


class Whole:
    """The model of a task in memory, in float32."""

    def __init__(self, folder: Path, of: Scoring) -> None:
        kind: Any = AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        self.task = of
        with torch.no_grad():
            self.base = [self.model(batch).logits.log_softmax(-1) for batch in of.batches[-of.judged :]]

    def rounded(self, changes: Mapping[int, int]) -> float:
        """The mean KL to the unrounded model with some groups rounded to nearest, in nats."""
        before: list[tuple[Tensor, Tensor]] = []
        for g, c in changes.items():
            group = self.task.groups[g]
            scheme = group.candidates[c]
            for weight in group.weights:
                if scheme is not None:
                    part = self.part(group, weight)
                    before.append((part, part.clone()))
                    made = round_to_nearest(part.clone(), scheme, self.task.scale_dtype)
                    part.copy_(made.dequantize(torch.float32))
        with torch.no_grad():
            logits = [self.model(batch).logits.log_softmax(-1) for batch in self.task.batches[-self.task.judged :]]
        for part, value in before:
            part.copy_(value)
        kl = [(b.exp() * (b - o)).sum(-1).flatten() for b, o in zip(self.base, logits, strict=True)]
        return float(torch.cat(kl).mean())

    def part(self, group: Group, weight: Any) -> Tensor:
        """The memory of a weight [out, in] in the model."""
        plan = self.task.plan
        if weight.block is None:
            names = [name for name, tensor in plan.links.source.items() if tensor == weight.tensor]
            found: Tensor = self.model.get_parameter(names[0]).data
            return found
        block, name = plan.blocks[weight.block], weight.view.parameter
        inside = self.model.get_submodule(block.name)
        if block.experts is not None and weight.expert is not None:
            stack = inside.get_parameter(f"{block.experts.info.module}.{name}").data
            return torch.Tensor(weight.view.of(stack[weight.expert]))
        return torch.Tensor(weight.view.of(inside.get_parameter(name).data))
