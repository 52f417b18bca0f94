"""QuantizedWeight: what every quantizer returns and every format stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.recipe import Scheme
from llmq_kernels.reference import dequantize

CHUNK = 1 << 21


@dataclass
class QuantizedWeight:
    """An integer-coded weight [out, in]: w ≈ (codes − zero) · scale, group by group along the input axis.

    codes: int8 [out, in], in [scheme.qmin, scheme.qmax]; scale: [out, groups], in the dtype it is stored in;
    zero: int8 [out, groups] in the range of the codes, or None when symmetric; notes: what fell back, for the report.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = ()

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
