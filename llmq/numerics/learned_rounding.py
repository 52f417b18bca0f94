"""Learned rounding: a real-valued position on the grid for every weight and a factor for every scale, by gradients.

SignRound (Cheng et al. 2023, arXiv:2309.05516, equations 3 to 5): with z the position of a weight on its grid,

    ŵ = s·f · (clamp(round(z), qmin, qmax) − zero),

where z and the factor f take steps against the sign of the loss's gradient, with a straight-through estimator for the
rounding: ∂L/∂z = s·f · ∂L/∂ŵ and ∂L/∂f = s · Σ (code − zero) · ∂L/∂ŵ over the group. The paper starts at z = w/s +
zero; here z starts at the code that the quantizer chose, even if it is not the nearest one, so that the quantizer's
result is the start.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight

# The largest distance of a starting position from its code.
EDGE = 0.49


def positions(weight: Tensor, q: QuantizedWeight) -> Tensor:
    """The position of each weight on the grid, as a real-valued rank (on the integer grid: in steps from 0), float32
    [out, groups, size]; rounding it gives `q.codes`.

    It is w / s + zero if that rounds to the code, else the nearest value that does.
    """
    rounding = q.rounding
    scale = q.scale.to(torch.float32).unsqueeze(-1)
    points = rounding.decode(q.codes, q.scheme).to(torch.float32).view(*scale.shape[:2], -1)
    away = weight.to(torch.float32).view_as(points) / scale - points
    if q.zero is not None:
        away += q.zero.to(torch.float32).unsqueeze(-1)
    # A weight of 0 in a group with scale 0 is where its code is.
    away = rounding.in_steps(away.nan_to_num_(0, torch.inf, -torch.inf), points, q.scheme)
    return away.clamp_(-EDGE, EDGE).add_(rounding.rank(points, q.scheme))


class LearnedWeight:
    """A quantized weight whose codes and scales are updated by gradients.

    q: the starting point; weight: any float [out, in], the original; momentum: of the gradient over steps, 0 for none.
    Uses two float32 matrices of the weight's size, and three float32 values per group.
    """

    def __init__(self, q: QuantizedWeight, weight: Tensor, momentum: float = 0.0) -> None:
        self.q, self.momentum = q, momentum
        self.rounding, self.limits = q.rounding, q.rounding.ranks(q.scheme)
        self.position = positions(weight, q)
        self.base = q.scale.to(torch.float32).unsqueeze(-1)
        self.factor = torch.ones_like(self.base)
        self.zero = None if q.zero is None else q.zero.to(torch.float32).unsqueeze(-1)
        self.slope, self.pull = torch.zeros_like(self.position), torch.zeros_like(self.base)

    def points(self) -> Tensor:
        """The current points of the grid, float32 [out, groups, size]."""
        return self.rounding.of_rank(self.position.round().clamp_(*self.limits), self.q.scheme)

    def scale(self) -> Tensor:
        """The scales in their stored precision, as float32 [out, groups, 1]: finite, normal, with unchanged sign."""
        return self.rounding.storable(self.base * self.factor, self.q.scale.dtype)

    def value(self, out: Tensor) -> None:
        """Write the dequantized weight to `out` [out, in], rounded once to its dtype."""
        levels = self.points()
        if self.zero is not None:
            levels -= self.zero
        out.copy_(levels.mul_(self.scale()).flatten(1))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against the sign of ∂L/∂ŵ [out, in], any float: positions by `rate` steps, factors by `scale_rate`.

        Positions stay less than one code beyond the ends of the grid, so that they can return.
        """
        slope = gradient.to(torch.float32).view_as(self.position)
        levels = self.points()
        if self.zero is not None:
            levels -= self.zero
        pull = levels.mul_(slope).sum(-1, keepdim=True).mul_(self.base)
        self.pull.lerp_(pull, 1 - self.momentum)
        # ∂ŵ/∂z = s: only its sign matters for the sign of the gradient.
        self.slope.lerp_(slope, 1 - self.momentum)
        if self.q.stored_scale is None:  # quantized scales are fixed
            self.factor.sub_(self.pull.sign(), alpha=scale_rate).clamp_(0.1, 10)
        signs = torch.sign(self.slope).mul_(self.base.sign())
        lowest, highest = self.limits
        self.position.sub_(signs, alpha=rate).clamp_(lowest - EDGE, highest + EDGE)

    def quantized(self) -> QuantizedWeight:
        """The current quantized weight."""
        codes = self.rounding.encode(self.points().flatten(1), self.q.scheme)
        if self.q.stored_scale is not None:
            return replace(self.q, codes=codes)
        return replace(self.q, codes=codes, scale=self.scale().squeeze(-1).to(self.q.scale.dtype))
