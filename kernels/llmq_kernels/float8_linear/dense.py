"""`llmq::float8_linear` by products of dequantized weights and inputs: on CPUs, and where torch has no float8 product.

torch converts float8_e4m3fn one value at a time on a CPU, and so does its `_scaled_mm` there, before every product
(measured on Zen 4: 4 ns a value). A shift and a mask do the same for whole vectors: sign, exponent and mantissa move to
where bfloat16 or float32 has them, and what is read there is the value times 2⁻¹²⁰, subnormal codes included.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.inputs import FLOAT8, steps
from llmq_kernels.weights import PackedFloat8

SLAB = 1 << 19
"""Values at a time that are dequantized, in cache."""
# By dtype: integers of its size, how far codes are shifted, and the bits that are kept.
MOVES = {torch.bfloat16: (torch.int16, 4, 0x87F0 - (1 << 16)), torch.float32: (torch.int32, 20, 0x87F00000 - (1 << 32))}
BIAS = 2.0**120
# Scales below this may be multiplied by BIAS first, and stay finite.
FOLDED = 128.0


def linear(x: Tensor, weight: PackedFloat8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded as in `reference.round_input`. x: float [M, in]. Returns [M, out] in x's dtype.

    Weights and rounded inputs are in the product's dtype: in bfloat16 both are rounded to it, as in stock transformers.
    """
    dtype = products.product_dtype(x)
    rounded = round_input(x, weight.input_scale, dtype)
    y = products.by_slabs(
        rounded, _slabs(weight, products.slab_size(x, weight.in_features), dtype), bias, weight.out_features
    )
    return y.to(x.dtype)


def round_input(x: Tensor, input_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x rounded to float8 and dequantized. x: float [M, in]; dtype: bfloat16, float32 or float16. Returns [M, in]."""
    scale = steps(x, input_scale, FLOAT8)
    found = torch.empty_like(x, dtype=dtype)
    for rows in products.row_slabs(len(x), x.shape[1], SLAB):
        some = scale if input_scale is not None else scale[rows]
        codes = (x[rows] / some).clamp_(-FLOAT8, FLOAT8).to(torch.float8_e4m3fn)
        # Codes have a NaN, which a shift does not keep.
        factor = some.expand(len(codes), 1).masked_fill(_strange(codes), torch.nan)
        decode(codes, factor, found[rows])
    return found


def dequantize(weight: PackedFloat8, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`."""
    shape = weight.out_features, weight.in_features
    return products.whole(_slabs(weight, SLAB, dtype), shape, dtype, weight.packed.device)


def decode(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write codes · scale to `out`, rounded once to its dtype.

    codes: float8_e4m3fn [M, n], none of them NaN; scale: float [M, 1]; out: bfloat16, float32 or float16 [M, n].
    """
    if out.dtype not in MOVES or out.device.type != "cpu":
        out.copy_(codes.to(torch.float32) * scale.to(torch.float32))
        return
    kind, shift, kept = MOVES[out.dtype]
    bits = out.view(kind)
    # The sign is copied to all the higher bits.
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(shift).bitwise_and_(kept)
    # A scale of the same dtype is multiplied in it, which is faster; others may have more bits.
    factor = scale if scale.dtype == out.dtype else scale.to(torch.float32)
    if float(factor.abs().amax()) < FOLDED:
        out.mul_(factor * BIAS)
    else:
        out.mul_(BIAS).mul_(factor)


def _strange(codes: Tensor) -> Tensor:
    """Whether rows of codes [M, n] have a NaN, [M, 1]."""
    return (codes.view(torch.int8) & 0x7F).amax(-1, keepdim=True) == 0x7F


def _slabs(weight: PackedFloat8, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows of `size` values at a time: their slice and values in `dtype`, which the next overwrites."""
    rows = min(products.slab_rows(weight.in_features, size), weight.out_features)
    values = torch.empty(rows, weight.in_features, dtype=dtype, device=weight.packed.device)
    for part in products.row_slabs(weight.out_features, weight.in_features, size):
        some = values[: part.stop - part.start]
        decode(weight.packed[part], weight.scale[part], some)
        yield part, some
