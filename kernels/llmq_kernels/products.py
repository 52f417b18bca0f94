"""Products with a dense weight, their dtype, and products with weights that are dequantized some rows at a time.

On a CPU, torch's float16 product depends on the processor: some have float16 instructions, which round the weight to
multiples of 6e-8 and may flush values below 6e-5 to zero; others compute in float32. So on a CPU float16 is always
multiplied in float32, and only the result is rounded. bfloat16 has float32's range; if oneDNN has no instructions for
it, torch uses plain loops, and float32 is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

NARROW = 128
"""Rows of x up to which slabs are narrow: reading x again for each then costs less than a slab outside the cache."""

Slabs = Iterable[tuple[slice, Tensor]]
"""A weight, some rows at a time: their slice and their values [rows, in], which the next may overwrite."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with inputs like x: x's own, except on a CPU (see the module's docstring)."""
    return _on_cpu(x.dtype) if x.device.type == "cpu" else x.dtype


@cache
def _on_cpu(dtype: torch.dtype) -> torch.dtype:
    narrow = dtype == torch.float16 or dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if narrow else dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias. x: float [..., in]; weight: float [out, in]; bias: float [out]. Returns [..., out] in x's dtype.

    Weight and bias are rounded to `product_dtype(x)`, sums are float32.
    """
    dtype = product_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] · W [k, n] → [..., n] in x's dtype, computed in `product_dtype(x)`."""
    dtype = product_dtype(x)
    return (x.to(dtype) @ weight.to(dtype)).to(x.dtype)


def row_slabs(rows: int, width: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of `rows` rows: each a multiple of `multiple` rows, and if possible of at most `most` values."""
    step = slab_rows(width, most, multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def slab_rows(width: int, most: int, multiple: int = 1) -> int:
    """The number of rows in a slice of `row_slabs`; the last may have fewer."""
    return max(1, most // (width * multiple)) * multiple


def slab_size(x: Tensor, width: int) -> int:
    """The values of a slab of rows of `width` that is multiplied with x: few, which stay in cache, but 64 rows, as
    products with fewer are slow; more if x has many. On a GPU a launch for each part would take longer than the part.
    """
    if x.device.type != "cpu":
        return 1 << 26
    return max(1 << 19, 64 * width) if len(x) <= NARROW else max(1 << 21, 256 * width)


def by_slabs(x: Tensor, slabs: Slabs, bias: Tensor | None, out_features: int) -> Tensor:
    """`linear` for x [M, in] with a weight [out, in] given some rows at a time."""
    dtype = product_dtype(x)
    wide = x.to(dtype)
    y = None
    for rows, weight in slabs:
        part = linear(wide, weight, None if bias is None else bias[rows])
        if part.shape[1] == out_features:
            return part.to(x.dtype)
        y = x.new_empty(x.shape[0], out_features, dtype=dtype) if y is None else y
        y[:, rows] = part
    return x.new_empty(x.shape[0], out_features) if y is None else y.to(x.dtype)


def whole(slabs: Slabs, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole weight [out, in] from slabs of rows, rounded to `dtype`."""
    dense = torch.empty(shape, dtype=dtype, device=device)
    for rows, weight in slabs:
        dense[rows] = weight
    return dense
