"""`llmq::int8_linear` on a CPU: integer products by torch._int_mm, exact and without a float copy of the weight.

_int_mm reorders its right operand before every product of more than one row. So that the smaller one is reordered, the
weight is the left operand (Yᵀ = W · Xᵀ), with zeros below x up to a number of rows that oneDNN is fast for, unless
there are as many rows as outputs. A few rows are multiplied one by one; how many is measured once per process. Without
AVX-512, _int_mm is a scalar loop, and with AVX-512 but no VNNI it is wrong: oneDNN adds two products in 16 bits, which
saturate. In both cases float32 products replace it, over so few inputs at a time that their sums are exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmq_kernels.int8_linear.reference import steps
from llmq_kernels.products import row_slabs
from llmq_kernels.timing import COPIES, PROBE, fastest
from llmq_kernels.weights import PackedInt8

MULTIPLE = 8
"""Of rows in a product: 3 and 5 rows take half as long again as 8."""
# Integers up to 2²⁴ are exact in float32, and so are sums of this many products of int8.
EXACT = 1024
# Rows of x in a product, and values at a time that are rounded before it and scaled after it, in cache.
ROWS, SLAB = 1024, 1 << 19


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to 8 bits, as in `reference.int8_linear`.

    x: float32, bfloat16 or float16 [M, in]; bias: float [out]. Returns [M, out] in x's dtype, rounded once. Raises
    ValueError from 131072 inputs on.
    """
    weight.check_sums()
    y = x.new_empty(x.shape[0], weight.out_features)
    factors = weight.scale.to(torch.float32).view(-1)
    bias = None if bias is None else bias.to(torch.float32)
    for start in range(0, len(x), ROWS):
        some, result = x[start : start + ROWS], y[start : start + ROWS]
        codes, x_scale = torch.empty_like(some, dtype=torch.int8), some.new_empty(len(some), 1, dtype=torch.float32)
        for rows in row_slabs(len(some), x.shape[1], SLAB):
            codes[rows], x_scale[rows] = round_input(some[rows], weight.input_scale)
        sums = multiply(codes, weight.packed)
        for rows in row_slabs(len(sums), weight.out_features, SLAB):
            part = sums[rows].to(torch.float32).mul_(x_scale[rows]).mul_(factors)
            result[rows] = part if bias is None else part.add_(bias)
    return y


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x rounded to int8, every step in x's own dtype. Returns int8 in x's shape, and the scale, [M, 1]."""
    scale = steps(x, input_scale)
    if input_scale is None:
        return (x / scale).clamp_(-128, 127).round_().to(torch.int8), scale
    levels = (x / scale).clamp_(-128, 127).round_()
    # A NaN has no code, and makes its row's scale NaN.
    strange = levels.isnan().any(-1, keepdim=True)
    return levels.nan_to_num_(0).to(torch.int8), scale.expand(x.shape[0], 1).masked_fill(strange, torch.nan)


def multiply(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [M, in] · weight [out, in]ᵀ, both int8. Returns exact integers, [M, out], as int32 or float64."""
    return _by_integers(codes, weight) if _has_instructions() else _by_float32(codes, weight)


def _by_integers(codes: Tensor, weight: Tensor) -> Tensor:
    rows = codes.shape[0]
    if rows <= 1 or rows < MULTIPLE and rows <= _one_by_one():
        return _each(codes, weight)
    return torch._int_mm(codes, weight.t()) if rows >= weight.shape[0] else _turned(codes, weight)


def _each(codes: Tensor, weight: Tensor) -> Tensor:
    """The product, row by row: then _int_mm does not reorder."""
    transposed = weight.t()
    return torch.cat([torch._int_mm(codes[at : at + 1], transposed) for at in range(codes.shape[0])])


def _turned(codes: Tensor, weight: Tensor) -> Tensor:
    """The product with the weight on the left."""
    rows = codes.shape[0]
    whole = torch.nn.functional.pad(codes, (0, 0, 0, -rows % MULTIPLE))
    return torch._int_mm(weight, whole.t()).t().contiguous()[:rows]


@functools.cache
def _one_by_one() -> int:
    """The number of rows that take as long one by one as MULTIPLE at once on this processor, by timing both."""
    codes = torch.ones(MULTIPLE, PROBE[1], dtype=torch.int8, device="cpu")
    weights = torch.ones(COPIES, *PROBE, dtype=torch.int8, device="cpu")
    one = fastest(_each, codes[:1], weights)
    return int(fastest(_turned, codes, weights) / one)


def _by_float32(codes: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float64)
    for start in range(0, weight.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total += codes[:, part].to(torch.float32) @ weight[:, part].to(torch.float32).t()
    return total


@functools.cache
def _has_instructions() -> bool:
    """Whether _int_mm is fast and exact here; exactness is tried with values that could saturate."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    codes, weight = (
        torch.randint(0, 2, (2, 16, 256), generator=generator, device="cpu").mul_(255).sub_(128).to(torch.int8)
    )
    exact = codes.long() @ weight.long().t()
    return torch.equal(_each(codes[:1], weight).long(), exact[:1]) and torch.equal(_turned(codes, weight).long(), exact)
