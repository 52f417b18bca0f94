"""Ternary weights: w ≈ {−1, 0, 1} · scale. Stored as 2-bit integers, of which −2 does not occur.

'minmax' is the closed form of ternary weight networks (Li, Zhang and Liu 2016, arXiv:1605.04711, equations 5 and 6):
the mean of the magnitudes above 0.7 of their mean. 'mse' and 'weighted' are the exact optimum over all scales that can
be stored. With a scale s a weight is not 0 if |w| > s/2, so the weights that are not 0 are the largest ones. For the
largest k, with importances a,

    Σ a(w − ŵ)² = Σ a·w² − 2s·A + s²·B,      A = Σ a|w| and B = Σ a over these k,

which is a parabola in s: of the scales that can be stored, the one nearest to A/B is the best. So the optimum is among
those of the k = 1, 2, … size of the group, of which two running sums give all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.codebook import Codebook
from llmq.grids.scheme import Scheme

THRESHOLD = 0.7
"""Of the mean magnitude: equation 6."""


class Ternary(Codebook):
    """See `Rounding`: the point of a code is itself."""

    code_dtype = torch.int8
    even = True

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        return torch.tensor([-1.0, 0.0, 1.0], device=device)

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: ties go to 0."""
        return scaled.round_().clamp_(-1, 1)

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`."""
        return points.to(torch.int8)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return codes

    def _search(
        self,
        weight: Tensor,
        root: Tensor | None,
        unit: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        factors: tuple[float, ...],
    ) -> Tensor:
        """See `Codebook`: the closed form if there are no factors, else the optimum."""
        size = weight.abs()
        above = size > THRESHOLD * size.mean(-1, keepdim=True)
        closed = self.storable((size * above).sum(-1, keepdim=True) / above.sum(-1, keepdim=True), dtype, unit)
        if not factors:
            return closed
        falling, order = size.sort(-1, descending=True)
        by = torch.ones_like(size) if root is None else root.square().expand_as(size).gather(-1, order)
        pull, count = falling.mul_(by).cumsum(-1), by.cumsum(-1)
        scale = self.storable(pull / count, dtype, unit)
        cost = torch.where(pull > 0, scale * (scale * count - 2 * pull), torch.inf)
        least, at = cost.min(-1, keepdim=True)
        # Where all weights that count are 0, any scale is as good.
        return torch.where(torch.isfinite(least), scale.gather(-1, at), closed)
