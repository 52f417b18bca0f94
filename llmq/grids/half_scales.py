"""Whole numbers with scales that float16 holds, whatever the dtype of the model: for formats whose scales are float16.

A scale of a bfloat16 model is a number of float16 from 2^-17 on; smaller ones, and those of float32 models, are rounded
once more, to a number that the stored dtype and float16 both hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import storable
from llmq.grids.integer import Integer
from llmq.grids.scheme import Scheme

SMALLEST, LARGEST = 2.0**-24, 255.0 * 2**8
"""The smallest number of float16 above 0, and the largest that bfloat16 holds too."""


class HalfInteger(Integer):
    """See `Rounding`."""

    def storable(self, scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
        """See `Rounding.storable`."""
        return _half(storable(scale, dtype, unit) * unit).div_(unit)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: that of integers, rounded once more."""
        scale, zero = super().find_scale(weight, scheme, method, importance, scale_dtype)
        return _half(scale.to(torch.float32)).to(scale_dtype), zero


def _half(scale: Tensor) -> Tensor:
    """The nearest number of float16, finite and not 0, of scales in float32."""
    size = scale.abs().clamp(SMALLEST, LARGEST).to(torch.float16).to(torch.float32)
    return torch.copysign(size, scale)
