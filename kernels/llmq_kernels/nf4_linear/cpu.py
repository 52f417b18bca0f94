"""NF4 on the CPU: both codes of a byte are looked up at once, in slabs of rows that torch's matmul reads from cache.

torch has no operator for codebook weights. Looking up codes one by one costs more than the matmul of hundreds of rows,
mostly for splitting bytes. A table of 256 pairs of float32, each gathered as one float64, splits and looks up in one
pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.nf4_linear.reference import nf4_absmax
from llmq_kernels.weights import PackedCodebook

SLAB = 1 << 20


def linear(x: Tensor, weight: PackedCodebook, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias. x: float [M, in]. Returns [M, out] in x's dtype."""
    return products.by_slabs(x, _slabs(weight), bias, weight.out_features)


def dequantize(weight: PackedCodebook, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    shape = weight.out_features, weight.in_features
    return products.whole(_slabs(weight), shape, dtype, weight.packed.device)


def _slabs(weight: PackedCodebook) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows at a time, from a block's start: their slice and float32 weight, which the next overwrites."""
    device, block_size, in_features = weight.packed.device, weight.block_size, weight.in_features
    absmax = nf4_absmax(weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.offset)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((weight.codebook[byte >> 4], weight.codebook[byte & 15]), dim=-1).to(torch.float32)
    table = pairs.view(torch.float64).view(1, 256)
    aligned = block_size // math.gcd(in_features, block_size)
    rows = min(products.slab_rows(in_features, SLAB, aligned), -(-weight.out_features // aligned) * aligned)
    blocks = rows * in_features // block_size
    index = torch.zeros(blocks * block_size // 2, dtype=torch.int64, device=device)
    found = torch.empty(blocks, block_size // 2, dtype=torch.float64, device=device)
    values = found.view(torch.float32)
    for part in products.row_slabs(weight.out_features, in_features, SLAB, aligned):
        start, count = part.start, (part.stop - part.start) * in_features
        octets = weight.packed[start * in_features // 2 :][: -(-count // 2)]
        index[: len(octets)].copy_(octets)
        torch.gather(table.expand(blocks, 256), 1, index.view(blocks, -1), out=found)
        scale = absmax[start * in_features // block_size :][:blocks]
        values[: len(scale)] *= scale.unsqueeze(-1)
        yield part, values.view(-1)[:count].view(-1, in_features)
