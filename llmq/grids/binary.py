"""Binary weights: w ≈ ±scale. Stored as 2-bit integers, of which only −1 and 1 occur.

The scale of least squared error is the mean magnitude (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279, equation 6;
the signs are those of BinaryConnect, Courbariaux et al. 2015, arXiv:1511.00363), with importances the weighted mean.
There is no 0: a group of zeros gets the smallest scale that can be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.scheme import Scheme
from llmq.grids.ternary import Ternary


class Binary(Ternary):
    """See `Rounding`: the point of a code is itself."""

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        return torch.tensor([-1.0, 1.0], device=device)

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: 0 goes to −1."""
        return torch.where(scaled > 0, 1.0, -1.0)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: positive; the smallest normal number if a whole group is 0."""
        scale, zero = super().find_scale(weight, scheme, method, importance, scale_dtype)
        empty = (weight == 0).view(*scale.shape, -1).all(-1)
        return scale.masked_fill_(empty, torch.finfo(scale.dtype).tiny), zero

    def _search(
        self,
        weight: Tensor,
        root: Tensor | None,
        unit: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        factors: tuple[float, ...],
    ) -> Tensor:
        """See `Codebook`: exact, with or without factors."""
        by = torch.ones_like(weight) if root is None else root.square().expand_as(weight)
        return self.storable((weight.abs() * by).sum(-1, keepdim=True) / by.sum(-1, keepdim=True), dtype, unit)
