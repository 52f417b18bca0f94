"""AWQ's weight clipping: search each group's scale by the error of the group's own output.

Lin et al. 2023, AWQ, arXiv:2306.00978, §5.1 and the authors' code: scales from min-max downwards, each judged by the
change of w·x over the calibration inputs x of the group. Here that is computed as e H eᵀ with e = w − ŵ and the group's
H = E[x xᵀ], which is equal and needs no inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight, round_to_grid, rounded_on, rounding_of
from llmq.grids.scheme import Scheme

FACTORS = (0.7, 0.75, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04, 1.08, 1.14, 1.2)
CHUNK = 1 << 20


def clip_groups(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, moments: Tensor) -> QuantizedWeight:
    """Round a weight with each group's scale multiplied by the factor with the least e H eᵀ; 1 is one of the factors.

    weight: float [out, in]; scale: [out, groups]; zero: int8 [out, groups] or None; moments: float32 [in, in], E[x xᵀ].
    """
    rows, width = weight.shape
    groups = scale.shape[1]
    size = width // groups
    inside = torch.stack([moments[g : g + size, g : g + size] for g in range(0, width, size)])
    best, rounding = scale.clone(), rounding_of(scheme.rules)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        held = None if zero is None else zero[start : start + step]
        least = torch.full((part.shape[0], groups), torch.inf, device=weight.device)
        for factor in (1.0, *FACTORS):
            tried = rounding.storable(scale[start : start + step].float() * factor, scale.dtype).to(scale.dtype)
            near = QuantizedWeight(round_to_grid(part, tried, held, scheme), tried, held, scheme)
            error = (part - near.dequantize(torch.float32)).view(-1, groups, size).transpose(0, 1)
            cost = ((error @ inside) * error).sum(-1).t()
            better = cost < least
            least = torch.where(better, cost, least)
            best[start : start + step] = torch.where(better, tried, best[start : start + step])
    return rounded_on(weight, best, zero, scheme)
