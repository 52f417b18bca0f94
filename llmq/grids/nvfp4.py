"""NVFP4: FP4 codes (e2m1), for every 16 inputs a scale in e4m3, and one scale of all scales, by which they are divided.

NVIDIA 2025, developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference. The scale
of scales is a power of two here. Then it only says which 15 powers of two the scales lie in, and no scale depends on
it: it is chosen last, and weights that a server makes one matrix of can be given the same one without any change
(`join`). And every product of a code and its scale has at most 6 bits, so it is exact in bfloat16, whatever the order
in which a reader multiplies.

'minmax' scales a group's largest magnitude to 6; 'mse' and 'weighted' try the scales around it, beyond the one that
scales it to 4 (Cook et al. 2025, Four Over Six), and down to two thirds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.coarse_scales import CoarseScales
from llmq.grids.minifloat import Minifloat

LOWEST, TOP = 2.0**-6, 7
"""The smallest normal number of e4m3, which some kernels need, and the exponent of the largest stored scale."""

LARGEST, SCALE = 6.0, 448.0
"""The largest number of e2m1, and of e4m3."""
UNUSED = 0.125
"""In the place of a stored scale of inputs that is 0, as compressed-tensors has it."""

FAR = "groups thousands of times smaller than the largest have the smallest scale there is"


class NVFP4(CoarseScales, Minifloat):
    """See `Rounding`. `stored_scale` of a finished weight is the scale of its scales, float32 [1]."""

    apart = False
    mantissa = 3
    steps = (1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5)

    def input_scale(self, top: Tensor, divisor: float, static: Tensor | None) -> Tensor:
        """See `Rounding.input_scale`: float32, of e4m3 over the divisor that inputs are stored with."""
        shared = divisor_of(torch.ones(1, device=top.device) if static is None else static)
        scale = (top / LARGEST).to(torch.float32).mul_(shared).clamp_(max=SCALE).to(torch.float8_e4m3fn)
        scale = scale.to(torch.float32)
        return scale.masked_fill_(scale == 0, UNUSED).div_(shared)

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
        """See `Rounding.finish`: with its own scale of scales."""
        return _with_global(weight, _global([weight]))

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """See `Rounding.reopen`: scales can move again."""
        return replace(super().reopen(weight), stored_scale=None)

    def join(self, weights: Sequence[Quantized], dtype: torch.dtype) -> list[Quantized]:
        """See `Rounding.join`: one scale of scales for all."""
        opened = [self.reopen(weight) for weight in weights]
        shared = _global(opened)
        return [_with_global(weight, shared) for weight in opened]


def divisor_of(scale: Tensor) -> Tensor:
    """The divisor of all scales of an input, float32 [1], for a static scale: the power of two not above its inverse.

    So no scale of a group depends on it, and inputs up to twice as large as any seen are not clipped.
    """
    mantissa, exponent = torch.frexp(scale.to(torch.float32))
    return torch.ldexp(torch.ones_like(mantissa), ((mantissa == 0.5).to(exponent.dtype) - exponent).clamp_(-100, 100))


def _used(weight: QuantizedWeight) -> Tensor:
    """The groups that have a code other than 0, bool [out, groups]: the scale of others does not matter."""
    return (weight.codes.view(*weight.scale.shape, -1) & 7 != 0).any(-1)


def _global(weights: Sequence[QuantizedWeight]) -> Tensor:
    """The divisor of all scales of some weights, float32 [1]: a power of two that puts the largest below 2^8."""
    top = max(float(torch.where(_used(weight), weight.scale, 0.0).amax()) for weight in weights)
    exponent = int(torch.frexp(torch.tensor(top))[1]) - 1 if top > 0 else 0
    return torch.tensor([2.0 ** (TOP - max(exponent, -100))])


def _with_global(weight: QuantizedWeight, divisor: Tensor) -> QuantizedWeight:
    """The weight with scales that e4m3 holds beside this scale of scales.

    Groups with scales below its range are rounded once more: they are 2^13 times smaller than the largest.
    """
    divisor = divisor.to(weight.scale.device)
    scale = weight.scale.to(torch.float32).clamp(LOWEST / float(divisor), 2.0 ** (TOP + 1) * 1.75 / float(divisor))
    # What is moved and not used needs no new codes.
    moved = (scale != weight.scale) & _used(weight)
    codes, notes = weight.codes, weight.notes
    if bool(moved.any()):
        notes = tuple(dict.fromkeys((*notes, FAR)))
        rounding = NVFP4()
        points = rounding.decode(codes, weight.scheme).view(*scale.shape, -1)
        again = rounding.nearest(points * (weight.scale / scale).unsqueeze(-1), None, weight.scheme)
        codes = rounding.encode(torch.where(moved.unsqueeze(-1), again, points).flatten(1), weight.scheme)
    return replace(weight, codes=codes, scale=scale, stored_scale=divisor, notes=notes)
