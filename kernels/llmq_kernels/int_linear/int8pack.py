"""8-bit weights on the CPU: torch's own operator for few rows; dequantization in cache and a matmul for many.

There is one copy of the weight, [groups, out, group]: the codes of one group of inputs are a matrix, which
`aten::_weight_int8pack_mm` multiplies by those inputs, with a scale per output. Its results are bfloat16 and are summed
in float32, so that a sum is off by about as much as its last rounding to bfloat16 takes. For many rows, and for weights
with zero points, some rows of the weight at a time are dequantized into a slab that stays in cache.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from llmq_kernels.checks import check
from llmq_kernels.int_linear.dense_bits import unpack
from llmq_kernels.products import by_slabs, product_dtype, row_slabs, slab_size, whole
from llmq_kernels.weights import PackedInt

MULTIPLE = 32
"""Of inputs: the operator reads beyond the end of rows that 16 does not divide."""
# Up to this many rows the operator is faster than slabs; in groups of 32, half as many. At 11008 x 4096 it takes 3.6 ms
# for one row and 1.8 for each further one, slabs 21 ms and torch's matmul. Both take the same at 12 to 14 rows there,
# for 4096 x 11008, 2048 x 2048 and 256 x 1024: CPU time of one thread, AMD EPYC (Zen 4, no AMX), torch 2.13.
OPERATOR_ROWS, WIDE = 12, 64
SLAB = 1 << 20
"""Elements of a slab."""


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """Why this layout does not support such a weight, or None."""
    if device.type != "cpu":
        return f"int8pack is for CPUs, not {device.type}"
    if dtype != torch.bfloat16:
        return f"int8pack computes in bfloat16, not {dtype}"
    if bits != 8:
        return f"int8pack holds 8 bits, not {bits}"
    if out_features < 1 or in_features < 1 or group_size < 1:
        return f"int8pack has no weight of {out_features} x {in_features} in groups of {group_size}"
    if _group(in_features, group_size) is None:
        return f"int8pack needs inputs and groups that {MULTIPLE} divides, not {in_features} in groups of {group_size}"
    return None if operator_is_fast() else "torch has no fast operator for 8-bit weights on this processor"


@cache
def operator_is_fast() -> bool:
    """Whether torch has vector code for this processor (ATen's int8mm_kernel.cpp), and multiplies correctly."""
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not vectors and platform.machine() not in ("aarch64", "arm64"):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(-128, 128, (8, MULTIPLE), generator=generator, dtype=torch.int8, device="cpu")
    x = torch.randint(-4, 5, (3, MULTIPLE), generator=generator, device="cpu").to(torch.bfloat16)
    try:
        y = torch.ops.aten._weight_int8pack_mm(x, codes, torch.full((8,), 0.5, dtype=torch.bfloat16, device="cpu"))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(y.float(), x.float() @ codes.float().t() / 2, rtol=2**-7)


def _group(in_features: int, group_size: int) -> int | None:
    """The inputs of a matrix: a group, or the whole row; None if the operator does not take them."""
    group = in_features if group_size >= in_features else group_size
    return group if in_features % group == 0 and group % MULTIPLE == 0 else None


def pack(plain: PackedInt, dtype: torch.dtype) -> PackedInt:
    """The plain form as packed int8 [groups, out, group], scale bfloat16 and zero int8 or None, both [groups, out].

    Raises ValueError if `refusal` gives a reason, or the shapes do not fit together.
    """
    words, scale, zero, bits = plain.packed, plain.scale, plain.zero, plain.bits
    out, in_features = plain.out_features, plain.in_features
    reason = refusal(words.device, dtype, bits, out, in_features, plain.group_size)
    if reason is not None:
        raise ValueError(reason)
    group = _group(in_features, plain.group_size) or 0
    check("words", words, torch.int32, (out, -(-in_features * bits // 32)))
    groups = in_features // group
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != (out, groups):
            raise ValueError(f"{name} must be {[out, groups]} for groups of {group}, not {[*tensor.shape]}")
    packed = words.new_empty(groups, out, group, dtype=torch.int8)
    for rows in row_slabs(out, in_features, SLAB):
        packed[:, rows] = unpack(words[rows], bits, in_features).view(-1, groups, group).transpose(0, 1)
    zeros = None if zero is None else zero.t().contiguous()
    return PackedInt(packed, scale.to(dtype).t().contiguous(), zeros, bits, out, in_features, plain.group_size)


def nbytes(dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int, zeros: bool) -> int:
    """See `Layout.nbytes`."""
    group = _group(in_features, group_size)
    if group is None:
        raise ValueError(f"int8pack does not hold {in_features} inputs in groups of {group_size}")
    return out_features * (in_features + in_features // group * (torch.bfloat16.itemsize + zeros))


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with a weight from `pack`. x: [M, in]. Returns [M, out] in x's dtype."""
    _check(weight)
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x must be [rows, {weight.in_features}], not {[*x.shape]}")
    if x.dtype != torch.bfloat16 or weight.zero is not None or len(x) > _operator_rows(weight):
        slabs = _slabs(weight, product_dtype(x), slab_size(x, weight.in_features))
        return by_slabs(x, slabs, bias, weight.out_features)
    groups, out, group = weight.packed.shape
    y = x.new_zeros(len(x), out, dtype=torch.float32)
    if len(x):
        parts = x.view(-1, groups, group).transpose(0, 1).contiguous().unbind()
        for part, codes, scale in zip(parts, weight.packed.unbind(), weight.scale.unbind(), strict=True):
            y += torch.ops.aten._weight_int8pack_mm(part, codes, scale).to(torch.float32)
    return (y if bias is None else y + bias).to(x.dtype)


def _operator_rows(weight: PackedInt) -> int:
    return OPERATOR_ROWS if weight.packed.shape[2] >= WIDE else OPERATOR_ROWS // 2


def dequantize(weight: PackedInt, dtype: torch.dtype) -> Tensor:
    """A weight from `pack`, dequantized to [out, in] in `dtype`."""
    _check(weight)
    shape = weight.out_features, weight.in_features
    return whole(_slabs(weight, dtype, SLAB), shape, dtype, weight.packed.device)


def _check(weight: PackedInt) -> None:
    """Check that all tensors fit together: the operator would read past the end of too few. Raises ValueError."""
    packed, scale, zero = weight.tensors
    group = _group(weight.in_features, weight.group_size)
    shape = None if group is None else (weight.in_features // group, weight.out_features, group)
    fits = packed.dtype == torch.int8 and packed.shape == shape and packed.is_contiguous()
    fits = fits and scale.dtype == torch.bfloat16 and scale.shape == packed.shape[:2] and scale.is_contiguous()
    if not fits or not (zero is None or (zero.dtype == torch.int8 and zero.shape == scale.shape)):
        found = [*packed.shape], [*scale.shape], None if zero is None else [*zero.shape]
        raise ValueError(
            f"a weight of {weight.out_features} x {weight.in_features} in groups of {weight.group_size} needs codes "
            f"int8 [groups, out, group] and scales bfloat16 [groups, out] from int8pack.pack, not {found}"
        )


def _slabs(weight: PackedInt, dtype: torch.dtype, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows at a time: their slice, and their values [rows, in] in `dtype`, which the next one overwrites.

    Values are scaled in float32 and rounded once, as torch's rounding to bfloat16 is slow.
    """
    groups, out, group = weight.packed.shape
    exact = weight.packed.new_empty(max(1, size // (groups * group)) * groups * group, dtype=torch.float32)
    turned = torch.empty_like(exact, dtype=dtype)
    for rows in row_slabs(out, groups * group, size):
        codes = weight.packed[:, rows]
        values = exact[: codes.numel()].view(codes.shape)
        values.copy_(codes)
        if weight.zero is not None:
            values -= weight.zero[:, rows, None]
        values *= weight.scale[:, rows, None].float()
        found = turned[: codes.numel()].view(-1, groups, group)
        found.copy_(values.transpose(0, 1))
        yield rows, found.view(-1, groups * group)
