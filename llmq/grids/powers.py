"""Levels that are powers of two, or sums of two of them, so that multiplying by one is a shift, or two and an addition.

`Log`: 0 and ±2⁰, ±2⁻¹, … ±2^−(2^(b−1) − 2), as many as have a code of b bits (Miyashita, Lee and Murmann 2016,
arXiv:1603.01025, section 3.2; with a scale, INQ, Zhou et al. 2017, arXiv:1702.03044, equation 1). A value is rounded to
the nearest level, not to the nearest logarithm, as in INQ (equation 4): that is the least squared error.

`APoT`: additive powers of two (Li, Dong and Wang 2020, arXiv:1909.13144, section 2.2 with k = 2, and its appendix for
odd numbers of bits): of b bits one is the sign, two are a power of two or 0, and what is left (4 bits: one) is another
that may be added: p ∈ {0, 2⁰, 2⁻¹, 2⁻³} and p̃ ∈ {0, 2⁻²}. With 3 bits nothing is added, and the levels are those of
`Log`. At 2 bits both would be ternary (`ternary`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq.grids.codebook import Codebook
from llmq.grids.scheme import Scheme


class Log(Codebook):
    """See `Rounding`."""

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        return _both_signs(tuple(2.0**-power for power in range((1 << (scheme.bits - 1)) - 1)), device)


class APoT(Codebook):
    """See `Rounding`. The largest level is 5/4 at 4 bits: the scale takes what the paper calls γ."""

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        first, second = ((0.0, 1.0, 0.5, 0.125), (0.0, 0.25)) if scheme.bits == 4 else ((0.0, 1.0, 0.5, 0.25), (0.0,))
        return _both_signs(tuple(one + other for one in first for other in second if one + other > 0), device)


@cache
def _both_signs(sizes: tuple[float, ...], device: torch.device) -> Tensor:
    """0 and these magnitudes with both signs, ascending."""
    return torch.tensor(sorted({0.0, *sizes, *(-size for size in sizes)}), device=device)
