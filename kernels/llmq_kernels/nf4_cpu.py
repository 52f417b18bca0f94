"""NF4 on the CPU: a byte, two codes, is looked up at once, in slabs of rows that torch's matmul reads from the cache.

torch has no operator for codes into a codebook. Looking up codes one by one costs more than the matmul of hundreds of
rows, and most of it is in taking bytes apart; a table of 256 pairs of float32, each gathered as one float64,
takes them apart and looks them up in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels.products import by_slabs
from llmq_kernels.reference import nf4_absmax

SLAB = 1 << 20


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight [out, in] of 4-bit codes into a codebook.

    x: float [M, in]; packed: uint8 [ceil(out·in/2)], high half first; absmax, codebook and what is nested as
    `reference.nf4_absmax` and `reference.nf4_dequantize` say. Returns [M, out] in x's dtype.
    """
    plain = nf4_absmax(absmax, nested_absmax, nested_codebook, offset)
    slabs = _slabs(packed, plain, codebook, out_features, in_features, block_size)
    return by_slabs(x, slabs, bias, out_features)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    whole = packed.new_empty(out_features, in_features, dtype=dtype)
    plain = nf4_absmax(absmax, nested_absmax, nested_codebook, offset)
    for part, weight in _slabs(packed, plain, codebook, out_features, in_features, block_size):
        whole[part] = weight
    return whole


def _slabs(
    packed: Tensor, absmax: Tensor, codebook: Tensor, out_features: int, in_features: int, block_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, beginning with a block: which, and their weight in float32. The next overwrites them."""
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((codebook[byte >> 4], codebook[byte & 15]), dim=-1).to(torch.float32)
    table = pairs.view(torch.float64).view(1, 256)
    whole = block_size // math.gcd(in_features, block_size)
    rows = min(max(1, SLAB // (in_features * whole)) * whole, -(-out_features // whole) * whole)
    blocks = rows * in_features // block_size
    index = torch.zeros(blocks * block_size // 2, dtype=torch.int64, device=packed.device)
    found = torch.empty(blocks, block_size // 2, dtype=torch.float64, device=packed.device)
    values = found.view(torch.float32)
    for start in range(0, out_features, rows):
        part = slice(start, min(start + rows, out_features))
        count = (part.stop - start) * in_features
        octets = packed[start * in_features // 2 :][: -(-count // 2)]
        index[: len(octets)].copy_(octets)
        torch.gather(table.expand(blocks, 256), 1, index.view(blocks, -1), out=found)
        scale = absmax[start * in_features // block_size :][:blocks]
        values[: len(scale)] *= scale.unsqueeze(-1)
        yield part, values.view(-1)[:count].view(-1, in_features)
