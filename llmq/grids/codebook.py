"""A grid given by a list of levels of any values, with one scale per group.

Methods other than min-max search the scale from above min-max downwards; after each candidate, the least-squares scale
for the levels that it chose is tried too (closed form). Whatever lowers the error is kept, and min-max is tried first,
so the search is never worse.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from llmq.grids.base import Rounding, check_range, parts, storable, weights_of
from llmq.grids.scheme import Scheme

FACTORS = (1.0, 1.05, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.64, 0.58, 0.52)
"""The candidate scales, as fractions of min-max."""


class Codebook(Rounding):
    """See `Rounding`; a subclass defines its levels, and may override more."""

    @abstractmethod
    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: at most 256, some of them 0 or below and some above."""

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: ties go to the lower level. There are no zero points."""
        levels = self.levels(scheme, scaled.device)
        return levels[torch.bucketize(scaled, self._bounds(scheme, scaled.device), out_int32=True)]

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`: the index of the level."""
        return torch.bucketize(points, self._bounds(scheme, points.device), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return self.levels(scheme, codes.device)[codes.to(torch.int32)]

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: positive; 1 if a whole group is 0."""
        rows, width = weight.shape
        check_range(method, scheme, width)
        groups, dtype = scheme.groups(width), self.scale_dtype or scale_dtype
        root = weights_of(method, importance, groups)
        scale = torch.empty(rows, groups, dtype=dtype, device=weight.device)
        for part in parts(weight, groups):
            found = self._search(
                part.weight / part.unit, root, part.unit, scheme, dtype, FACTORS if method != "minmax" else ()
            )
            scale[part.rows] = torch.where(part.top > 0, found * part.unit, 1.0).squeeze(-1).to(dtype)
        return scale, None

    def _search(
        self,
        weight: Tensor,
        root: Tensor | None,
        unit: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        factors: tuple[float, ...],
    ) -> Tensor:
        """The best scale of groups [rows, groups, size] normalized to magnitude 1, float32 [rows, groups, 1]."""
        levels = self.levels(scheme, weight.device)
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        below = -low / -levels[0] if float(levels[0]) < 0 else -low
        top = torch.maximum(high / levels[-1], below).clamp_min_(0)
        best = storable(top, dtype, unit)
        least = torch.full_like(best, torch.inf)
        for factor in factors:
            scale = storable(top * factor, dtype, unit)
            for again in (True, False):
                points = self.nearest(weight / scale, None, scheme)
                left = torch.addcmul(weight, points, scale, value=-1)
                if root is not None:
                    left *= root
                    points *= root
                error = left.square().sum(-1, keepdim=True)
                better = error < least
                best, least = torch.where(better, scale, best), torch.where(better, error, least)
                if again:
                    fit = (left * points).sum(-1, keepdim=True) / points.square().sum(-1, keepdim=True)
                    fitted = scale + fit
                    scale = storable(torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale), dtype, unit)
        return best

    @cache  # noqa: B019  there is one object for each grid, as long as the program runs
    def _bounds(self, scheme: Scheme, device: torch.device) -> Tensor:
        """The midpoints between neighbouring levels, float32 ascending."""
        levels = self.levels(scheme, device)
        return (levels[:-1] + levels[1:]) / 2
