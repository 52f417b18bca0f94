"""Whole numbers: w ≈ (code − zero) · scale, codes from −2^(bits−1) to 2^(bits−1) − 1. The point of a code is itself."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import Rounding
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme


class Integer(Rounding):
    """See `Rounding`: levels are evenly spaced, so values are simply rounded, without a table."""

    code_dtype = torch.int8
    even = True

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        return torch.arange(scheme.qmin, scheme.qmax + 1, dtype=torch.float32, device=device)

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`."""
        scaled.round_()
        if zero is not None:
            scaled += zero
        return scaled.clamp_(scheme.qmin, scheme.qmax)

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`."""
        return points.to(torch.int8)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return codes

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`; the search is in `ranges`."""
        return find_range(weight, scheme, method, importance, scale_dtype)

    def reach(self, scheme: Scheme) -> float:
        """See `Rounding.reach`: half the span of the codes, on whichever side the extra level is."""
        return float((2**scheme.bits - 1) / 2)

    def round_input(self, scaled: Tensor) -> Tensor:
        """See `Rounding.round_input`: to 8 bits, the only width that inputs have here."""
        return scaled.clamp(-128.0, 127.0).round_()

    def rank(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.rank`: the code."""
        return points

    def of_rank(self, ranks: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.of_rank`: the code."""
        return ranks

    def ranks(self, scheme: Scheme) -> tuple[int, int]:
        """See `Rounding.ranks`."""
        return scheme.qmin, scheme.qmax

    def whole(self, scheme: Scheme) -> tuple[int, int] | None:
        """See `Rounding.whole`."""
        return self.ranks(scheme)

    def in_steps(self, away: Tensor, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.in_steps`: a step is 1."""
        return away
