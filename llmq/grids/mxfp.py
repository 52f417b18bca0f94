"""Microscaling floats: FP4, FP6 or FP8 codes, and for every 32 inputs a scale that is a power of two.

Rouhani et al. 2023, OCP Microscaling Formats (MX) Specification 1.0; scales are E8M0, exponents in a byte. 'minmax' is
compressed-tensors' own choice, which clips the largest value where that loses little: the power of two below the
group's largest magnitude, which is rounded to a few bits first, over that below the grid's largest value. 'mse' and
'weighted' try one exponent less and one more as well; less squared error so found is not always less loss of the model
(docs/benchmarks.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmq.grids.coarse_scales import MANTISSA, SMALLEST, CoarseScales
from llmq.grids.float8 import Float8
from llmq.grids.minifloat import EXPONENT, Minifloat
from llmq.grids.scheme import Scheme

BIAS = 127
"""Of a stored exponent."""


class PowerScales(CoarseScales):
    """See `CoarseScales`. kept: to how many bits of mantissa the largest magnitude is rounded; below: log2 of the
    grid's largest value, floored.
    """

    mantissa = 0
    steps = (-1, 1)
    kept: int
    below: int

    def first(self, top: Tensor, scheme: Scheme) -> Tensor:
        """See `CoarseScales.first`."""
        bits = top.view(torch.int32) + (1 << (MANTISSA - self.kept - 1))
        power = (bits & EXPONENT).view(torch.float32).clamp(max=2.0**127)
        return (power * 2.0**-self.below).clamp_(SMALLEST, self.largest)

    def input_scale(self, top: Tensor, divisor: float, static: Tensor | None) -> Tensor:
        """See `Rounding.input_scale`: as `first`, by the bits of top's own dtype, of which subnormal numbers are 0."""
        info = torch.finfo(top.dtype)
        mantissa = round(-math.log2(info.eps))
        bits = top.view(torch.int16 if info.bits == 16 else torch.int32)
        kept = (bits.to(torch.int32) + (1 << (mantissa - self.kept - 1))) >> mantissa
        bias = round(1 - math.log2(info.tiny))
        power = torch.where(kept > 0, kept - (bias + self.below), -BIAS).clamp_(-BIAS, BIAS + 1)
        scale = torch.exp2(power.to(torch.float32)).to(top.dtype)
        return scale.masked_fill_(scale == 0, 1.0)


class MXFP4(PowerScales, Minifloat):
    """e2m1: 0 to 6."""

    kept, below = 1, 2


class MXFP6(PowerScales, Minifloat):
    """e2m3: 0 to 7.5."""

    kept, below = 3, 2


class MXFP8(PowerScales, Float8):
    """e4m3: 0 to 448."""

    largest = 2.0**118
    kept, below = 1, 8
