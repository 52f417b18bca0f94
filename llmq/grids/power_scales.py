"""Whole numbers with scales that are powers of two, so that multiplying by one is a shift.

Jacob et al. 2018, arXiv:1712.05877, §2.2, requantize by a multiplier and a shift; with such scales the shift alone is
left (Jain et al. 2020, TQT, arXiv:1903.08066, §3; CMSIS-NN's q7 and q15 functions, Lai et al. 2018, arXiv:1801.06601).
Scales are positive: integers (`integer`) may have negative ones, which would need a negation as well.

'minmax' takes the smallest power of two at which no weight is clipped by more than half a step, as at the scale of
`ranges`: the nearest one may be a third smaller than that scale, and clip the largest weights by a third. 'mse' and
'weighted' round each group with this one and the three below it, and keep the best, so the search is exact among these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmq.grids.base import check_range, parts, weights_of
from llmq.grids.integer import Integer
from llmq.grids.scheme import Scheme

STEPS = (0, -1, -2, -3)
"""The exponents that are tried, from that of 'minmax' on."""


class PowerInteger(Integer):
    """See `Rounding`."""

    def storable(self, scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
        """See `Rounding.storable`: the nearest power of two, and of two equally near the smaller."""
        true, info = scale * unit, torch.finfo(dtype)
        fraction, exponent = torch.frexp(true.abs().clamp_(info.tiny, info.max))
        exponent = (exponent - (fraction <= 0.75).to(exponent.dtype)).clamp_(max=int(math.log2(info.max)))
        return torch.copysign(_power(exponent), true).div_(unit)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: positive; 1 if a whole group is 0."""
        rows, width = weight.shape
        check_range(method, scheme, width)
        groups = scheme.groups(width)
        root = weights_of(method, importance, groups)
        scale = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
        zero = torch.zeros(rows, groups, dtype=torch.int8, device=weight.device)
        for part in parts(weight, groups):
            steps = STEPS if method != "minmax" else (0,)
            found, held = self._search(part.weight / part.unit, root, part.unit, scheme, scale_dtype, steps)
            scale[part.rows] = torch.where(part.top > 0, found * part.unit, 1.0).squeeze(-1).to(scale_dtype)
            zero[part.rows] = torch.where(part.top > 0, held, 0.0).squeeze(-1).to(torch.int8)
        return scale, None if scheme.symmetric else zero

    def _search(
        self,
        weight: Tensor,
        root: Tensor | None,
        unit: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        steps: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        """The best scale and zero point of groups [rows, groups, size] normalized to magnitude 1, [rows, groups, 1]."""
        low, high = weight.amin(-1, keepdim=True).clamp_(max=0), weight.amax(-1, keepdim=True).clamp_(min=0)
        span = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
        first = power_above(span / (2**scheme.bits - 1))
        best, kept, least = first, torch.zeros_like(first), torch.full_like(first, torch.inf)
        for step in steps:
            scale = self.storable(first * 2.0**step, dtype, unit)
            for zero in _zeros(scheme, low / scale, high / scale, len(steps) > 1):
                points = self.nearest(weight / scale, zero, scheme).sub_(zero)
                left = torch.addcmul(weight, points, scale, value=-1)
                error = (left if root is None else left.mul_(root)).square_().sum(-1, keepdim=True)
                better = error < least
                best, kept = torch.where(better, scale, best), torch.where(better, zero, kept)
                least = torch.where(better, error, least)
        return best, kept


def power_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below a scale: float32 of any shape, 2^-126 or more."""
    fraction, exponent = torch.frexp(scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny))
    return _power(exponent - (fraction == 0.5).to(exponent.dtype))


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, float32: a frexp's exponent, whose fraction is below 1."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _zeros(scheme: Scheme, low: Tensor, high: Tensor, several: bool) -> list[Tensor]:
    """Zero points for groups whose ends, divided by the scale, are `low` and `high`: at which the codes begin with the
    lowest weight; and, if several are wanted, end with the highest, or divide what is left evenly."""
    if scheme.symmetric:
        return [torch.zeros_like(low)]
    below, above = scheme.qmin - low, scheme.qmax - high
    found = (below, (below + above) / 2, above) if several else (below,)
    return [zero.round().clamp_(scheme.qmin, scheme.qmax) for zero in found]
