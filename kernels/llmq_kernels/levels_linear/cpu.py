"""Levels of each row on a CPU: both codes of a byte are looked up at once, as in `nf4_linear`, in a table of each row.

A row's table of 256 pairs of float32 costs 256 values to make, and saves splitting a byte for every two weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.weights import PackedLevels

SLAB = 1 << 20


def linear(x: Tensor, weight: PackedLevels, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias. x: float [M, in]. Returns [M, out] in x's dtype."""
    slabs = _slabs(weight, products.slab_size(x, weight.in_features))
    return products.by_slabs(x, slabs, bias, weight.out_features)


def dequantize(weight: PackedLevels, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`."""
    return products.whole(_slabs(weight, SLAB), (weight.out_features, weight.in_features), dtype, weight.packed.device)


def _slabs(weight: PackedLevels, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows at a time: their slice and their float32 weight, which the next overwrites."""
    rows = products.slab_rows(weight.in_features, size)
    rows = min(rows, weight.out_features)
    index = torch.empty(rows, weight.packed.shape[1], dtype=torch.int64, device=weight.packed.device)
    pairs = torch.empty(rows, 16, 16, 2, device=weight.packed.device)
    found = torch.empty(index.shape, dtype=torch.float64, device=weight.packed.device)
    for part in products.row_slabs(weight.out_features, weight.in_features, size):
        count, levels = part.stop - part.start, weight.levels[part]
        index[:count].copy_(weight.packed[part])
        # The first code of a byte is its low half.
        pairs[:count, :, :, 0] = levels.unsqueeze(1)
        pairs[:count, :, :, 1] = levels.unsqueeze(2)
        table = pairs[:count].view(torch.float64).view(count, 256)
        torch.gather(table, 1, index[:count], out=found[:count])
        yield part, found[:count].view(torch.float32)[:, : weight.in_features]
