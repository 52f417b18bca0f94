"""`llmq::int8_linear` on a CPU: integer products by torch._int_mm, exact and without a float copy of the weight.

_int_mm reorders its right operand before every product of more than one row, which costs as much as reading the weight
about forty times. So the weight is the left operand (Yᵀ = W · Xᵀ) and x is reordered; a few rows are multiplied one by
one. Without AVX-512, _int_mm is a scalar loop, and with AVX-512 but no VNNI it is wrong: oneDNN adds two products in 16
bits, which saturate. In both cases float32 products replace it, over so few inputs at a time that their sums are exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmq_kernels.int8_linear.reference import steps
from llmq_kernels.weights import PackedInt8

# Up to this many rows, one by one is faster: measured on 1024 and 4096 outputs, in docs/benchmarks.md.
ONE_BY_ONE = 4
# Integers up to 2²⁴ are exact in float32, and so are sums of this many products of int8.
EXACT = 1024


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to 8 bits, as in `reference.int8_linear`.

    x: float32, bfloat16 or float16 [M, in]; bias: float [out]. Returns [M, out] in x's dtype, rounded once. Raises
    ValueError from 131072 inputs on.
    """
    weight.check_sums()
    codes, x_scale = round_input(x, weight.input_scale)
    y = multiply(codes, weight.packed).to(torch.float32)
    y.mul_(x_scale.to(torch.float32)).mul_(weight.scale.to(torch.float32).view(-1))
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(x.dtype).contiguous()


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
    if codes.shape[0] > ONE_BY_ONE:
        return torch._int_mm(weight, codes.t()).t()
    transposed = weight.t()
    return torch.cat([torch._int_mm(codes[at : at + 1], transposed) for at in range(codes.shape[0])])


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
    return all(torch.equal(_by_integers(codes[:rows], weight).long(), exact[:rows]) for rows in (1, len(codes)))
