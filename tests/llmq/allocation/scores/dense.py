"""Tasks for scores by gradients, and the same gradients of a whole model in memory, by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import job
from llmq.allocation.groups import groups_of
from llmq.allocation.scores import Scoring
from llmq.allocation.scores import _backward as module
from llmq.block.statistics import Hessian
from llmq.discovery.inputs import collect
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent, Watch

CANDIDATES = (Scheme(2, 32), Scheme(4, 32), None)
IDS = torch.randint(10, 250, (6, 24), generator=torch.Generator().manual_seed(0))


def task_of(
    folder: Path,
    ids: Tensor = IDS,
    candidates: Sequence[Scheme | None] = CANDIDATES,
    *,
    method: str = "gptq",
    judged: int = 0,
    batch: int | None = None,
    kept: Path | None = None,
    watch: Watch | None = None,
    include: tuple[str, ...] = (),
) -> Scoring:
    """A task on all groups of a model folder."""
    options = {"correct": "none"} if method == "gptq" else {}
    recipe = Recipe(methods=(method,), scheme=Scheme(4, 32), options=options, include=include)
    plan = job.plan(str(folder), recipe, ids=ids)
    groups = groups_of(plan.weights, recipe, candidates, plan.dtype)
    batches = torch.split(ids, batch or len(ids))
    cpu, how = torch.device("cpu"), plan.pipeline.quantizer
    return Scoring(plan, groups, how, batches, judged, plan.dtype, cpu, watch or Silent(), kept)


def changes_of(task: Scoring, whole: nn.Module, observed: Tensor) -> list[list[list[Tensor] | None]]:
    """What each candidate's rounding changes of each weight of each group, with the inputs of the whole model."""
    found: list[list[list[Tensor] | None]] = []
    for group in task.groups:
        assert group.block is not None
        block = whole.get_submodule(task.plan.blocks[group.block].name)
        views = [weight.view for weight in group.weights if weight.view is not None]
        seen = {view: Hessian(view.get(block).shape[1], task.device) for view in views}
        with torch.no_grad(), collect(block, {view: [one] for view, one in seen.items()}):
            whole(input_ids=observed)
        changes: list[list[Tensor] | None] = []
        for scheme in group.candidates:
            if scheme is None:
                changes.append(None)
                continue
            stats = [{Hessian: seen[view]} for view in views]
            values = [view.get(block) for view in views]
            rounded = [
                task.quantizer.quantize(v, scheme, s, torch.float32).dequantize(v.dtype)
                for v, s in zip(values, stats, strict=True)
            ]
            changes.append([r - v for r, v in zip(rounded, values, strict=True)])
        found.append(changes)
    return found


def losses_of(task: Scoring, whole: nn.Module, text: Tensor, observed: Tensor, diagonal: bool) -> list[list[float]]:
    """½ Δᵀ F Δ per token by the same labels, with F from outer products of gradients of the whole model, in float64."""
    changes = changes_of(task, whole, observed)
    luck = module.chances(task.plan.recipe.seed, text.shape[1])
    sums = [[0.0] * len(group.candidates) for group in task.groups]
    for i in range(module.SAMPLES):
        whole.zero_grad()
        logits = whole(input_ids=text[[i % len(text)]]).logits
        labels = module.drawn(logits, luck[[i]])
        logits.log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
        for g, group in enumerate(task.groups):
            assert group.block is not None
            block = whole.get_submodule(task.plan.blocks[group.block].name)
            gradients = []
            for weight in group.weights:
                assert weight.view is not None
                gradient = block.get_parameter(weight.view.parameter).grad
                assert gradient is not None
                gradients.append(weight.view.of(gradient).double())
            for c, change in enumerate(changes[g]):
                parts = [a * b.double() for a, b in zip(gradients, change or [], strict=bool(change))]
                sums[g][c] += (
                    sum(float(p.square().sum()) for p in parts) if diagonal else sum(float(p.sum()) for p in parts) ** 2
                )
    return [[one / (2 * module.SAMPLES * text.shape[1]) for one in row] for row in sums]
