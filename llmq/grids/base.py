"""What every quantizer returns and every format stores: QuantizedWeight on a grid of steps, or a kind of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmq.grids.scheme import Scheme
from llmq_kernels.reference import dequantize

CHUNK = 1 << 21


class Quantized(Protocol):
    """A rounded weight [out, in], as it is stored: a dataclass with at least these. notes: what fell back."""

    @property
    def scheme(self) -> Scheme:
        """Its grid."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What fell back, for the report."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that is stored, computed in float32 and rounded once to `dtype`."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] on a grid of steps: w ≈ (codes − zero) · scale, group by group along the input axis.

    codes: int8 [out, in], in [scheme.qmin, scheme.qmax], or float8_e4m3fn where the grid is 'fp8'; scale: [out,
    groups], in the dtype it is stored in; zero: int8 [out, groups] in the range of the codes, or None when symmetric;
    notes: what fell back, for the report; input_scale: float32 [1], where the input is rounded by a static scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = ()
    input_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the codes stand for, computed in float32 and rounded once to `dtype`."""
        rows, width = self.codes.shape
        weight = torch.empty(rows, width, dtype=dtype, device=self.codes.device)
        # Some rows at a time, so that no float32 copy of the whole is made.
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            zero = None if self.zero is None else self.zero[part]
            weight[part] = dequantize(self.codes[part], self.scale[part], zero)
        return weight
