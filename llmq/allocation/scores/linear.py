"""One divergence per group, for its smallest candidate; the others by the squared error of the weights.

HIGGS' linearity theorem (Malinovskii et al. 2024, arXiv:2411.17525, theorem 1): the loss is about Σ a · t² over weights
with relative errors t, and a is measured here, once for each group.
"""

from __future__ import annotations

from llmq.allocation.scores import Scoring
from llmq.allocation.scores._linear import extended, unmeasured
from llmq.allocation.scores._walk import Walk


def pairs(task: Scoring) -> list[tuple[int, int]]:
    """The groups and candidates that are measured."""
    first = (next(((g, c) for c, s in enumerate(group.candidates) if s), None) for g, group in enumerate(task.groups))
    return [pair for pair in first if pair is not None]


def losses(task: Scoring) -> list[list[float]]:
    """See `llmq.allocation.scores`."""
    chosen = pairs(task)
    walk = Walk(task, [{g: c} for g, c in chosen], unmeasured(task, dict.fromkeys(chosen, 0.0)))
    return extended(task, dict(zip(chosen, walk.run(), strict=True)), walk.errors)
