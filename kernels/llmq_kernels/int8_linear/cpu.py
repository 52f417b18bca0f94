"""`llmq::int8_linear` on a CPU: integer products by torch._int_mm, exact and without a float copy of the weight.

_int_mm reorders its right operand before every product of more than one row. So that the smaller one is reordered, the
weight is the left operand (Yᵀ = W · Xᵀ), with zeros below x up to a number of rows that oneDNN is fast for, unless
there are as many rows as outputs. A few rows are multiplied one by one, or, if they are bfloat16, by the operator for
weights of 8 bits, which rounds sums to bfloat16, so that these results are rounded twice; what is fastest is measured
once per process. Without AVX-512, _int_mm is a scalar loop, and with AVX-512 but no VNNI it is wrong: oneDNN adds two
products in 16 bits, which saturate. In both cases float32 products replace it, over so few inputs at a time that their
sums are exact.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmq_kernels.inputs import INT8, steps
from llmq_kernels.int_linear import int8pack
from llmq_kernels.products import row_slabs
from llmq_kernels.timing import COPIES, PROBE, fastest
from llmq_kernels.weights import PackedInt8

MULTIPLE = 8
"""Of rows in a product: 3 and 5 rows take half as long again as 8."""
FEW = 4
"""Rows that the operator for weights of 8 bits multiplies in one pass over the weight."""
# Integers up to 2²⁴ are exact in float32, and so are sums of this many products of int8.
EXACT = 1024
# Rows of x in a product, and values at a time that are rounded before it and scaled after it, in cache.
ROWS, SLAB = 1024, 1 << 18


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to 8 bits, as in `reference.int8_linear`.

    x: float32, bfloat16 or float16 [M, in]; bias: float [out]. Returns [M, out] in x's dtype, rounded once; for up to
    FEW rows of bfloat16, perhaps twice. Raises ValueError from 131072 inputs on.
    """
    weight.check_sums()
    y = x.new_empty(x.shape[0], weight.out_features)
    factors = weight.scale.to(torch.float32).view(-1)
    bias = None if bias is None else bias.to(torch.float32)
    # Torch's operator takes whole weights only.
    whole = x.dtype == torch.bfloat16 and weight.packed.is_contiguous()
    rounded = whole and _operator_is_fastest(len(x), x.shape[1])
    for start in range(0, len(x), ROWS):
        some, result = x[start : start + ROWS], y[start : start + ROWS]
        codes, x_scale = _round_in_cache(some, weight.input_scale)
        sums = _by_operator(codes, weight.packed) if rounded else multiply(codes, weight.packed)
        _scale(sums, x_scale, factors, bias, result)
    return y


def _round_in_cache(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`round_input`, some rows at a time, with scales in float32."""
    if x.numel() <= SLAB:
        codes, scale = round_input(x, input_scale)
        return codes, scale.to(torch.float32)
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)
    for rows in row_slabs(len(x), x.shape[1], SLAB):
        codes[rows], scale[rows] = round_input(x[rows], input_scale)
    return codes, scale


def _scale(sums: Tensor, x_scale: Tensor, factors: Tensor, bias: Tensor | None, result: Tensor) -> None:
    """Write sums [M, out] · x_scale [M, 1] · factors [out] + bias [out] to result, in the order in which sums lie."""
    turned = sums.stride(0) == 1 and sums.numel() > SLAB
    if turned:
        sums, x_scale, factors = sums.t(), x_scale.t(), factors.unsqueeze(1)
        bias = None if bias is None else bias.unsqueeze(1)
    scaled = result.new_empty(sums.shape) if turned else result
    for rows in row_slabs(len(sums), sums.shape[1], SLAB):
        some = sums[rows]
        part = some.new_empty(some.shape, dtype=torch.float32).copy_(some)
        part.mul_(x_scale if turned else x_scale[rows]).mul_(factors[rows] if turned else factors)
        if bias is not None:
            part.add_(bias[rows] if turned else bias)
        scaled[rows] = part
    if turned:
        result.copy_(scaled.t())


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x rounded to int8, every step in x's own dtype. Returns int8 in x's shape, and the scale, [M, 1]."""
    scale = steps(x, input_scale, INT8)
    if input_scale is None:
        return (x / scale).clamp_(-128, 127).round_().to(torch.int8), scale
    levels = (x / scale).clamp_(-128, 127).round_()
    # A NaN has no code, and makes its row's scale NaN.
    strange = levels.isnan().any(-1, keepdim=True)
    return levels.nan_to_num_(0).to(torch.int8), scale.expand(x.shape[0], 1).masked_fill(strange, torch.nan)


def multiply(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [M, in] · weight [out, in]ᵀ, both int8. Returns exact integers [M, out], int32 or float64, in any order."""
    return _by_integers(codes, weight) if _has_instructions() else _by_float32(codes, weight)


def _by_integers(codes: Tensor, weight: Tensor) -> Tensor:
    rows = codes.shape[0]
    if rows <= 1 or rows < MULTIPLE and rows * _times().one < _times().multiple:
        return _each(codes, weight)
    return torch._int_mm(codes, weight.t()) if rows >= weight.shape[0] else _turned(codes, weight)


def _each(codes: Tensor, weight: Tensor) -> Tensor:
    """The product, row by row: then _int_mm does not reorder."""
    transposed = weight.t()
    return torch.cat([torch._int_mm(codes[at : at + 1], transposed) for at in range(codes.shape[0])])


def _turned(codes: Tensor, weight: Tensor) -> Tensor:
    """The product with the weight on the left."""
    rows = codes.shape[0]
    if rows % MULTIPLE:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -rows % MULTIPLE))
    return torch._int_mm(weight, codes.t()).t()[:rows]


def _by_operator(codes: Tensor, weight: Tensor) -> Tensor:
    """The product, rounded to bfloat16. Integers of 8 bits are bfloat16 too, and sums are float32."""
    ones = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(codes.to(torch.bfloat16), weight, ones)
    return y


def _operator_is_fastest(rows: int, width: int) -> bool:
    """For so many rows of that many inputs; the operator reads beyond the end of others."""
    if not 1 < rows <= FEW or width % int8pack.MULTIPLE or not _has_instructions() or not int8pack.operator_is_fast():
        return False
    return _times().few < min(rows * _times().one, _times().multiple)


class Times(NamedTuple):
    """Seconds of a product of one row, of FEW by the operator, and of MULTIPLE at once."""

    one: float
    few: float
    multiple: float


@functools.cache
def _times() -> Times:
    """What products of few rows take on this processor."""
    codes = torch.ones(MULTIPLE, PROBE[1], dtype=torch.int8, device="cpu")
    weights = torch.ones(COPIES, *PROBE, dtype=torch.int8, device="cpu")
    few = fastest(_by_operator, codes[:FEW], weights) if int8pack.operator_is_fast() else math.inf
    return Times(fastest(_each, codes[:1], weights), few, fastest(_turned, codes, weights))


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
