"""Losses of candidates that were not measured, from one that was: proportional to the weights' squared error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.allocation.scores import Scoring
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme


def squared_error(weight: Tensor, scheme: Scheme | None, scale_dtype: torch.dtype) -> Tensor:
    """‖Δ‖² of a weight [out, in] rounded to nearest, and ‖weight‖²: float64 [2] on the CPU; scheme None: Δ is 0."""
    whole = weight.double().square().sum()
    if scheme is None:
        return torch.stack([torch.zeros_like(whole), whole]).cpu()
    apart = round_to_nearest(weight, scheme, scale_dtype).dequantize(torch.float32) - weight
    return torch.stack([apart.double().square().sum(), whole]).cpu()


def ratio(apart: float, whole: float) -> float:
    """Their ratio, 0 for a weight of zeros."""
    return apart / whole if whole else 0.0


def unmeasured(task: Scoring, measured: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """The groups and candidates of which errors are needed: those not measured, and the one that stands for them."""
    found = []
    for g, group in enumerate(task.groups):
        mine = [c for c, scheme in enumerate(group.candidates) if scheme is not None]
        known = [c for c in mine if (g, c) in measured]
        rest = [c for c in mine if (g, c) not in measured]
        found += [(g, c) for c in (known[-1:] + rest if rest else [])]
    return found


def extended(
    task: Scoring, measured: Mapping[tuple[int, int], float], errors: Mapping[tuple[int, int], float]
) -> list[list[float]]:
    """The losses of all candidates. measured: by group and candidate; errors: of those that `unmeasured` names."""
    found = []
    for g, group in enumerate(task.groups):
        known = [c for c, scheme in enumerate(group.candidates) if scheme is not None and (g, c) in measured]
        row = []
        for c, scheme in enumerate(group.candidates):
            if scheme is None or not known:
                row.append(0.0)
            elif c in known:
                row.append(max(0.0, measured[g, c]))
            else:
                row.append(max(0.0, measured[g, known[-1]]) * ratio(errors[g, c], errors[g, known[-1]]))
        found.append(row)
    return found
