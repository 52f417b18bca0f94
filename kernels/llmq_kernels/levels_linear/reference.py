"""The reference of a codebook for each row in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def levels_dequantize(packed: Tensor, levels: Tensor, n: int) -> Tensor:
    """The weight of codes with a codebook for each row: W[r, i] = levels[r, code[r, i]], float32 [out, n].

    packed: uint8 [out, ceil(n/2)], the first of two 4-bit codes in the low half; levels: float32 [out, 16].
    """
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :n]
    return levels.to(torch.float32).gather(1, codes.to(torch.int64))


def levels_linear(x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for a weight with a codebook for each row. x: float [..., in]; else as in `levels_dequantize`."""
    return products.linear(x, levels_dequantize(packed, levels, x.shape[-1]), bias)
