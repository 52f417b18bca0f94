"""NF4 on the CPU: both codes of a byte are looked up at once, in slabs of rows that torch's matmul reads from cache.

torch has no operator for codebook weights. Looking up codes one by one costs more than the matmul of hundreds of rows,
mostly for splitting bytes. A table of 256 pairs of float32, each gathered as one float64, splits and looks up in one
pass; for products in bfloat16, a table of 65536 times four entries in float16, each found as one integer of 64 bits,
takes half as many steps. Of a codebook's entry, float16 loses an eighth of what bfloat16 will.
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
    of_fours = products.product_dtype(x) == torch.bfloat16 and _has_fours(weight)
    slabs = _slabs_of_fours(weight, products.slab_size(x, weight.in_features)) if of_fours else _slabs(weight)
    return products.by_slabs(x, slabs, bias, weight.out_features)


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


def _has_fours(weight: PackedCodebook) -> bool:
    """Whether four codes that follow each other are always two whole bytes of one block."""
    size = weight.out_features * weight.in_features
    whole = weight.packed.is_contiguous() and weight.packed.storage_offset() % 2 == 0
    return whole and size % weight.block_size == 0 and weight.block_size % 4 == 0


def _slabs_of_fours(weight: PackedCodebook, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows of `size` values at a time: their slice and weight in bfloat16, which the next overwrites.

    Entries are looked up in float16, as shares of the largest, and scaled in float32.
    """
    device, block_size, in_features = weight.packed.device, weight.block_size, weight.in_features
    peak = weight.codebook.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    table = _table_of_fours(weight.codebook / peak)
    absmax = nf4_absmax(weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.offset) * peak
    aligned = block_size // math.gcd(in_features, block_size)
    rows = min(products.slab_rows(in_features, size, aligned), weight.out_features)
    # index_select is faster, but runs on one thread.
    alone = torch.get_num_threads() == 1
    index = torch.empty(rows * in_features // 4, dtype=torch.int32 if alone else torch.int64, device=device)
    found = torch.empty(index.shape, dtype=torch.int64, device=device)
    exact = torch.empty(rows * in_features, dtype=torch.float32, device=device)
    rounded = torch.empty(rows * in_features, dtype=torch.bfloat16, device=device)
    words = weight.packed.view(torch.uint16)
    for part in products.row_slabs(weight.out_features, in_features, size, aligned):
        start, count = part.start * in_features, (part.stop - part.start) * in_features
        some = index[: count // 4].copy_(words[start // 4 : (start + count) // 4])
        fours = found[: count // 4]
        if alone:
            torch.index_select(table, 0, some, out=fours)
        else:
            parts = count // block_size
            torch.gather(table.expand(parts, -1), 1, some.view(parts, -1), out=fours.view(parts, -1))
        values = exact[:count].copy_(fours.view(torch.float16))
        values.view(-1, block_size).mul_(absmax[start // block_size : (start + count) // block_size].unsqueeze(-1))
        yield part, rounded[:count].copy_(values).view(-1, in_features)


def _table_of_fours(codebook: Tensor) -> Tensor:
    """The entries in float16 that two bytes select, as int64 [65536]; the first of two codes is a byte's high half."""
    byte = torch.arange(256, device=codebook.device)
    pairs = torch.stack((codebook[byte >> 4], codebook[byte & 15]), dim=-1).to(torch.float16)
    low = pairs.view(torch.int32).view(-1).to(torch.int64) & 0xFFFFFFFF
    return (low.unsqueeze(1) << 32 | low).view(-1)
