"""Small floating-point numbers of a sign, two bits of exponent and a few of mantissa: e2m1 (FP4) and e2m3 (FP6).

Rouhani et al. 2023, OCP Microscaling Formats (MX) Specification 1.0, section 5.3: the exponent's bias is 1, there is no
infinity and no NaN. A code has the sign in its highest bit; codes without it are in the order of their magnitudes.
Ties go to the even code, as in compressed-tensors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq.grids.base import Rounding
from llmq.grids.scheme import Scheme

EXPONENT = 0x7F800000
"""The bits of a float32 that are its exponent: alone, they are the largest power of two that is not above it."""


class Minifloat(Rounding):
    """See `Rounding`: the bits of mantissa follow from the scheme's bits. There are no zero points."""

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: 0 and −0 are one point."""
        return torch.unique(_numbers(scheme.bits, device))  # type: ignore[no-any-return]

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: values beyond the largest are clipped."""
        return _nearest(scaled, scheme.bits - 3)

    def round_input(self, scaled: Tensor) -> Tensor:
        """See `Rounding.round_input`: to four bits, the only width that inputs have here."""
        return _nearest(scaled.to(torch.float32, copy=True), 1).to(scaled.dtype)

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`: −0 becomes the code of 0."""
        magnitudes = _numbers(scheme.bits, points.device)[: 1 << (scheme.bits - 1)]
        # One less than a magnitude's own index would need equality; half-way bounds forgive rounding.
        bounds = (magnitudes[:-1] + magnitudes[1:]) / 2
        codes = torch.bucketize(points.abs().contiguous(), bounds, out_int32=True).to(torch.uint8)
        return codes.add_((points < 0).to(torch.uint8), alpha=1 << (scheme.bits - 1))

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return _numbers(scheme.bits, codes.device)[codes.to(torch.int32)]


def _nearest(scaled: Tensor, mantissa: int) -> Tensor:
    """The nearest number with so many bits of mantissa; scaled: float32, overwritten."""
    scaled.clamp_(-_largest(mantissa), _largest(mantissa))
    # A step is the power of two below the value over 2^mantissa; below 1 it is that of 1.
    steps = (scaled.view(torch.int32) & EXPONENT).view(torch.float32).clamp_(min=1.0).mul_(2.0**-mantissa)
    return scaled.div_(steps).round_().mul_(steps)


def _largest(mantissa: int) -> float:
    return 4 * (2 - 2.0**-mantissa)


@cache
def _numbers(bits: int, device: torch.device) -> Tensor:
    """The number of every code, float32 [2^bits]: the positive ones ascending, then the negative ones."""
    mantissa = bits - 3
    small = [step * 2.0**-mantissa for step in range(1 << mantissa)]
    normal = [(1 + step * 2.0**-mantissa) * 2.0**e for e in range(3) for step in range(1 << mantissa)]
    return torch.tensor([*small, *normal, *(-value for value in (*small, *normal))], device=device)
