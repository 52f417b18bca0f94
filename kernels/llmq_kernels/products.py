"""Products with a dense weight, the dtype that they are made in, and weights that come some rows at a time.

On a CPU, torch's float16 product depends on the processor: some multiply float16 with instructions of their own, which
round the weight to a grid that ends at 6e-8 and may take what is below 6e-5 for zero; others go through float32. So
float16 is multiplied in float32 there, on every processor, and only the result is rounded. bfloat16 has float32's
range; torch multiplies it by plain loops where oneDNN has no instructions for it, and float32 is faster there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

Slabs = Iterable[tuple[slice, Tensor]]
"""A weight, some rows at a time: which, and their values [rows, in]. The next may overwrite them."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with inputs like x is made in: x's own, but as the module says on a CPU."""
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
    """x [..., k] · W [k, n] → [..., n] in x's dtype, made in `product_dtype(x)`."""
    dtype = product_dtype(x)
    return (x.to(dtype) @ weight.to(dtype)).to(x.dtype)


def row_slabs(rows: int, width: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Parts of so many rows of a width: whole multiples, of at most `most` values where one is no more than that."""
    step = slab_rows(width, most, multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def slab_rows(width: int, most: int, multiple: int = 1) -> int:
    """How many rows a part of `row_slabs` has; the last may have fewer."""
    return max(1, most // (width * multiple)) * multiple


def by_slabs(x: Tensor, slabs: Slabs, bias: Tensor | None, out_features: int) -> Tensor:
    """`linear` for x [M, in] with a weight [out, in] that comes some rows at a time."""
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
    """A weight [out, in] that comes some rows at a time, rounded to `dtype`."""
    dense = torch.empty(shape, dtype=dtype, device=device)
    for rows, weight in slabs:
        dense[rows] = weight
    return dense
