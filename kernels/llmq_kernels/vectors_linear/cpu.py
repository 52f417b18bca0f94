"""Bytes that select vectors of weights, on a CPU: for a few rows of x the inputs are multiplied with the table, not the
weight.

A byte has 256 values, so a vector of n inputs has 256 products with it: they are computed once, and a row of the weight
is a sum of what its bytes select (as in T-MAC, Wei et al. 2024, arXiv:2407.00088, section 3). That is one lookup for n
weights, and the weight is never unpacked; every row of x costs it again. With more rows, some rows of the weight at a
time are unpacked and multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.weights import PackedVectors

FEW = 4
"""Rows of x up to which sums are looked up."""
SLAB = 1 << 19
"""Weights that are unpacked at a time."""
CHUNK = 1 << 18
"""Bytes that are looked up at a time."""


def linear(x: Tensor, weight: PackedVectors, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias. x: float [M, in]. Returns [M, out] in x's dtype."""
    if len(x) <= FEW:
        return _by_sums(x, weight, bias)
    return products.by_slabs(x, _slabs(weight), bias, weight.out_features)


def dequantize(weight: PackedVectors, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`."""
    return products.whole(_slabs(weight), (weight.out_features, weight.in_features), dtype, weight.packed.device)


def _by_sums(x: Tensor, weight: PackedVectors, bias: Tensor | None) -> Tensor:
    """`linear` by looking up the products of a vector's inputs with each entry; sums are float32."""
    rows, (books, groups, count, out) = len(x), weight.packed.shape
    n = weight.table.shape[-1]
    wide = x.to(torch.float32).view(rows, groups, weight.group_size)
    wide = torch.nn.functional.pad(wide, (0, count * n - weight.group_size)).view(rows, groups, count, n)
    y = torch.zeros(rows, out, device=x.device)
    step = max(1, CHUNK // out)
    for group in range(groups):
        sums = torch.zeros_like(y)
        for book in range(books):
            found = wide[:, group] @ weight.table[book].t()
            for start in range(0, count, step):
                index = weight.packed[book, group, start : start + step].to(torch.int64)
                for row in range(rows):
                    sums[row] += found[row, start : start + step].gather(1, index).sum(0)
        y.addcmul_(sums, weight.scale[group].to(torch.float32))
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _slabs(weight: PackedVectors) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows at a time: their slice and their float32 weight, which the next may overwrite."""
    books, groups, count, _ = weight.packed.shape
    n = weight.table.shape[-1]
    for part in products.row_slabs(weight.out_features, weight.in_features, SLAB):
        found: Tensor | None = None
        for book in range(books):
            index = weight.packed[book, :, :, part].flatten(0, 1).t().reshape(-1).to(torch.int32)
            chosen = weight.table[book].index_select(0, index)
            found = chosen if found is None else found.add_(chosen)
        assert found is not None
        inside = found.view(-1, groups, count * n)[..., : weight.group_size]
        inside = inside.mul_(weight.scale[:, part].t().unsqueeze(-1))
        yield part, inside.reshape(-1, weight.in_features)
