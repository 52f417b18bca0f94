"""The squared error of the weights, relative to the weights. No text, no run of the model; a poor guide between groups.

It says nothing of how much a weight matters: of two measured models, one gets worse by it than with the same bits for
all weights, and both much worse than by other scores. It is what is left where a model cannot be run on this machine.
"""

from __future__ import annotations

import torch

from llmq.allocation.scores import Scoring
from llmq.allocation.scores._linear import ratio, squared_error
from llmq.planning.weights import WeightPlan
from llmq.streaming.block_reader import BlockReader


def losses(task: Scoring) -> list[list[float]]:
    """See `llmq.allocation.scores`; the unit is that of no divergence."""
    sums = [torch.zeros(len(group.candidates), 2, dtype=torch.float64) for group in task.groups]
    task.watch.stage("Rounding weights", sum(len(group.weights) for group in task.groups))
    for g, group in enumerate(task.groups):
        for weight in group.weights:
            value = _read(task, weight)
            for c, scheme in enumerate(group.candidates):
                sums[g][c] += squared_error(value, scheme, task.scale_dtype)
            task.watch.step("")
    return [[ratio(*pair) for pair in found.tolist()] for found in sums]


def _read(task: Scoring, weight: WeightPlan) -> torch.Tensor:
    """A weight [out, in], float32, on the device."""
    return BlockReader(task.plan, task.device).weight(weight).float()
