"""NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): the arithmetic is in `llmq.grids.nf4`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.grids.base import Quantized
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method, Stats


class NF4(Method):
    """bitsandbytes' 4-bit format with double quantization; no calibration data. It is the base format of QLoRA."""

    scheme: ClassVar[dict[str, Any]] = {"grid": "nf4", "bits": 4, "group_size": 64, "double_quant": True}

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        return round_to_nearest(weight, scheme, scale_dtype)

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return ("nf4",)
