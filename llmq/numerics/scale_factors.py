"""Factors on the scales of a quantized weight, its codes fixed: ŵ = s·f · (point − zero).

The loss's gradient with respect to the factor of a group is ∂L/∂f = s · Σ (point − zero) · ∂L/∂ŵ over the group, or
over the groups of all channels that share a scale, whose factors start equal and so stay equal. Scales are rounded to
their stored dtype in every value; the gradient ignores that rounding (straight-through).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import READ, QuantizedWeight, rounding_of

SMALLEST, LARGEST = 0.1, 10.0
"""The limits of a factor."""


def scaled_by(q: QuantizedWeight, factor: Tensor) -> QuantizedWeight:
    """The weight with its scales multiplied by factors, float32 [out, groups], and rounded to their dtype.

    Factors beyond the limits are clipped; the scale of a group whose factor is 1, or that is 0, does not change.
    """
    scale = q.scale.to(torch.float32)
    clipped = factor.to(scale.device).clamp(SMALLEST, LARGEST)
    moved = rounding_of(q.scheme.rules).storable(scale * clipped, q.scale.dtype).to(q.scale.dtype)
    return replace(q, scale=torch.where((clipped == 1) | (scale == 0), q.scale, moved))


def factor_gradient(q: QuantizedWeight, gradient: Tensor) -> Tensor:
    """∂L/∂f, [out, groups] in float32 or wider, from ∂L/∂ŵ [out, in]. q: with the scales that factors multiply."""
    rows, width = q.codes.shape
    groups = q.scale.shape[1]
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    found = torch.empty(rows, groups, dtype=dtype, device=gradient.device)
    rounding = q.rounding
    # Some rows at a time, so that there is no float32 copy of the whole weight.
    step = max(1, READ // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        points = rounding.part(part).decode(q.codes[part], q.scheme).to(dtype).view(-1, groups, width // groups)
        if q.zero is not None:
            points = points - q.zero[part].unsqueeze(-1)
        found[part] = (points * gradient[part].to(dtype).view_as(points)).sum(-1)
    found.mul_(q.scale.to(dtype))
    for start in range(0, rows if q.scheme.rules.rows > 1 else 0, q.scheme.rules.rows):
        # Channels that share a scale share its factor: equal gradients keep their factors equal.
        band = slice(start, start + q.scheme.rules.rows)
        found[band] = found[band].sum(0)
    return found
