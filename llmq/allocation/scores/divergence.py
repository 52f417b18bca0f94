"""The divergence of the logits with one group rounded alone: measured, for every candidate; the best, and the dearest.

Each group and candidate is a variant of the model that runs from the group's block to the last one on a few windows, so
the time grows with the square of the number of blocks. Divergences of single groups nearly add up at 3 bits and more.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmq.allocation.groups import Group
from llmq.allocation.scores import Scoring
from llmq.allocation.scores._linear import extended, unmeasured
from llmq.allocation.scores._walk import Walk

MEASURED = 4
"""Candidates of up to so many bits are measured; of more, predicted from these by the error of the weights."""


def pairs(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """The groups and candidates that are measured."""
    found = []
    for g, group in enumerate(groups):
        mine = [(c, scheme.bits) for c, scheme in enumerate(group.candidates) if scheme is not None]
        near = [c for c, bits in mine if bits <= MEASURED] or [c for c, _ in mine[:1]]
        found += [(g, c) for c in near]
    return found


def losses(task: Scoring) -> list[list[float]]:
    """See `llmq.allocation.scores`."""
    chosen = pairs(task.groups)
    walk = Walk(task, [{g: c} for g, c in chosen], unmeasured(task, dict.fromkeys(chosen, 0.0)))
    return extended(task, dict(zip(chosen, walk.run(), strict=True)), walk.errors)
