"""Scales with few bits of mantissa, one for each group: so few that each neighbour of a good one can be tried.

A scale is float32 while it is searched, and any power of two times a number of so many bits. Rounding each weight with
every candidate costs less than a search on a line, and finds the best one exactly. The first candidate is that of
'minmax', and is replaced only by something better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import Rounding, check_range, parts, weights_of
from llmq.grids.scheme import Scheme

SMALLEST = 2.0**-126
"""The smallest scale: float32's smallest normal number."""
MANTISSA = 23
"""Of a float32, in bits."""


class CoarseScales(Rounding):
    """See `Rounding`: a base of grids with such scales, which are positive.

    mantissa: the bits of a scale's mantissa; steps: the candidates, as numbers of steps from that of 'minmax'; largest:
    of the scales, so that no product with a point is infinite in float32.
    """

    scale_dtype = torch.float32
    mantissa: int
    steps: tuple[int, ...]
    largest = 2.0**124

    def first(self, top: Tensor, scheme: Scheme) -> Tensor:
        """The scale of 'minmax' of groups with the largest magnitude `top`, float32 of any shape."""
        return self.storable(top / self.reach(scheme), torch.float32)

    def storable(self, scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
        """See `Rounding.storable`: rounded to nearest."""
        bits = (scale * unit).abs_().clamp_(SMALLEST, self.largest).view(torch.int32)
        dropped = MANTISSA - self.mantissa
        even = (bits >> dropped) & 1
        rounded = (bits + ((1 << (dropped - 1)) - 1) + even) >> dropped << dropped
        return rounded.view(torch.float32).clamp_(max=self.largest).div_(unit)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: positive; 1 if a whole group is 0."""
        rows, width = weight.shape
        check_range(method, scheme, width)
        groups = scheme.groups(width)
        root = weights_of(method, importance, groups)
        scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
        for part in parts(weight, groups):
            found = self.first(part.top, scheme)
            if method != "minmax":
                found = self._search(part.weight / part.unit, root, part.unit, found, scheme)
            scale[part.rows] = torch.where(part.top > 0, found, 1.0).squeeze(-1)
        return scale, None

    def _search(self, weight: Tensor, root: Tensor | None, unit: Tensor, first: Tensor, scheme: Scheme) -> Tensor:
        """The best scale of groups [rows, groups, size] normalized to magnitude 1 by `unit`, [rows, groups, 1]."""
        step = 1 << (MANTISSA - self.mantissa)
        best, least = first, torch.full_like(first, torch.inf)
        for steps in (0, *self.steps):
            scale = (first.view(torch.int32) + steps * step).view(torch.float32).clamp(SMALLEST, self.largest)
            near = scale / unit
            left = torch.addcmul(weight, self.nearest(weight / near, None, scheme), near, value=-1)
            error = (left if root is None else left.mul_(root)).square_().sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best
