"""4-bit weights on the CPU: torch's own operator for few rows; dequantization in cache and a matmul for many.

There is one copy of the weight, in the order that `aten::_convert_weight_to_int4pack_for_cpu` writes. The operator,
`aten::_weight_int4pack_mm_for_cpu`, dequantizes all weights again for every four rows of x, which is fastest for few
rows and very slow for many. For many rows, a few blocks of output rows at a time are therefore unpacked from the same
bytes into a slab that stays in cache, laid out as the right operand of torch's matmul.

The operator packs blocks of output rows, [block, in, block/2] bytes, each byte two codes of one input; the number of
rows per block, and which two rows share a byte, depend on torch's build and on the CPU. Both are found once per process
by packing known codes (`packing`); other orders are refused.

Codes of 2 and 3 bits are stored as 4-bit codes, of which they are a subset. If the operator does not support the group
size (channel, 96 …), scales are repeated for a smaller one that it supports.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmq_kernels.checks import FLOATS, check
from llmq_kernels.int_linear.dense_bits import unpack
from llmq_kernels.products import product_dtype, row_slabs
from llmq_kernels.weights import PackedInt

OPERATOR_GROUPS = (256, 128, 64, 32)

# Up to this many rows the operator is faster than slabs. It costs 1.5 ms per four rows at 4096 x 4096; slabs cost a
# fixed 10 ms and torch's matmul. Both take the same time at 48 rows for 4096 x 4096, 14336 x 4096 and 4096 x 14336:
# CPU time of one thread, AMD EPYC (Zen 4, avx512_bf16, no AMX), torch 2.13. So do experts' weights, many of them one
# after the other: 48 rows for 1536 x 2048, 48 to 64 for 2048 x 768.
OPERATOR_ROWS = 48

# Elements of a slab: the fastest of 2^18 … 2^22 from 16 to 512 rows, measured as above.
SLAB = 1 << 20
# Codes packed at a time: 16 MiB as int32.
PACKED_AT_ONCE = 1 << 22


class Packing(NamedTuple):
    """How torch packs on this CPU: rows per block; whether a byte holds rows d and d + block/2, or 2d and 2d + 1."""

    block: int
    halves: bool


@cache
def packing() -> Packing | None:
    """Torch's order, found by packing known codes; None if it is another order, or torch cannot pack."""
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(0, 16, (128, 32), generator=generator, dtype=torch.int32, device="cpu")
    for block in (64, 32, 16):
        for halves in (True, False):
            how = Packing(block, halves)
            try:
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_spread(codes, how).contiguous(), 1)
            except (AttributeError, NotImplementedError, RuntimeError):
                return None
            if torch.equal(_codes(packed.view(-1, 32, block // 2)), codes.t().to(torch.int8)):
                return how
    return None


def _spread(rows: Tensor, how: Packing) -> Tensor:
    """Rows [rows, …] reordered so that neighbours share a byte of the operator's packing."""
    if not how.halves:
        return rows
    return rows.view(-1, how.block // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _gather(columns: Tensor, how: Packing) -> Tensor:
    """Columns [n, rows] from the operator's order back to their own: the inverse of `_spread`."""
    if not how.halves:
        return columns
    return (
        columns.view(len(columns), columns.shape[1] // how.block, 2, how.block // 2)
        .transpose(2, 3)
        .reshape(columns.shape)
    )


def _codes(packed: Tensor, space: Tensor | None = None) -> Tensor:
    """The codes 0…15 of whole blocks. packed: u8 [blocks, in, block/2]. Returns int8 [in, blocks·block].

    Uses passes over contiguous memory, which torch vectorizes; it does not for short rows.
    space: a buffer, int16 [2, at least packed.numel()].
    """
    blocks, n, half = packed.shape
    codes, shifted = (
        packed.new_empty(2, packed.numel(), dtype=torch.int16) if space is None else space[:, : packed.numel()]
    )
    codes.view(n, blocks, half).copy_(packed.transpose(0, 1))
    torch.bitwise_left_shift(codes, 4, out=shifted)
    codes |= shifted
    codes &= 0x0F0F
    in_bytes: Tensor = codes.view(torch.int8)
    return in_bytes.view(n, blocks * half * 2)


def _group(in_features: int, group_size: int) -> int | None:
    """The operator's largest group size that divides both; scales are repeated for it. None if there is none."""
    whole = in_features if group_size >= in_features else group_size
    return next((group for group in OPERATOR_GROUPS if whole % group == 0 and in_features % group == 0), None)


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """Why this layout does not support such a weight, or None."""
    if device.type != "cpu":
        return f"int4pack is for CPUs, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"int4pack computes in bfloat16, float16 or float32, not {dtype}"
    if bits not in (2, 3, 4):
        return f"int4pack holds up to 4 bits, not {bits}"
    if out_features < 1 or in_features < 1 or group_size < 1:
        return f"int4pack has no weight of {out_features} x {in_features} in groups of {group_size}"
    if _group(in_features, group_size) is None:
        return f"int4pack needs inputs and groups that 32 divides, not {in_features} in groups of {group_size}"
    if packing() is None:
        return "this torch packs 4-bit weights in an order that int4pack does not know, or not at all"
    return None


def pack(plain: PackedInt, dtype: torch.dtype) -> PackedInt:
    """The plain form, packed for torch's operator, a few rows at a time.

    With `rows` = out rounded up to whole blocks and g the operator's group, packed is u8 [rows, in/2]; scale
    [in/g, rows, …], in the operator's order of rows: for bfloat16 the operator's pairs of scale and −zero·scale,
    rounded to bfloat16; for other dtypes, which do not use the operator, float32 scales only; zero int8 [in/g, rows],
    in the weight's order of rows, or None. Raises ValueError if `refusal` gives a reason, or the shapes do not fit
    together.
    """
    words, scale, zero, bits = plain.packed, plain.scale, plain.zero, plain.bits
    out, in_features, group_size = plain.out_features, plain.in_features, plain.group_size
    reason = refusal(words.device, dtype, bits, out, in_features, group_size)
    how, group = packing(), _group(in_features, group_size)
    if reason is not None or how is None or group is None:
        raise ValueError(reason)
    check("words", words, torch.int32, (out, -(-in_features * bits // 32)))
    groups = -(-in_features // group_size)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != (out, groups):
            raise ValueError(f"{name} must be {[out, groups]} for groups of {group_size}, not {[*tensor.shape]}")
    rows = -(-out // how.block) * how.block
    packed = words.new_empty(rows, in_features // 2, dtype=torch.uint8)
    for some in row_slabs(rows, in_features, PACKED_AT_ONCE, how.block):
        codes = unpack(words[some], bits, in_features).add_(8).to(torch.int32)
        if len(codes) < some.stop - some.start:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, some.stop - some.start - len(codes)), value=8)
        packed[some] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_spread(codes, how), 1)
    of_group = torch.arange(in_features // group, device=words.device) * group // group_size
    pairs = dtype == torch.bfloat16
    terms = words.new_zeros(rows, groups, 1 + pairs, dtype=dtype if pairs else torch.float32)
    terms[:out, :, 0] = scale
    if zero is not None and pairs:
        terms[:out, :, 1] = -zero.float() * terms[:out, :, 0].float()
    terms = _spread(terms, how).transpose(0, 1)[of_group].contiguous()
    zeros = None
    if zero is not None:
        zeros = zero.new_zeros(rows, groups)
        zeros[:out] = zero
        zeros = zeros.t()[of_group].contiguous()
    return PackedInt(packed, terms, zeros, bits, out, in_features, group_size)


def nbytes(dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int, zeros: bool) -> int:
    """See `Layout.nbytes`: 4 bits for each code, whatever `bits` are, and scales of the operator's group size."""
    how, group = packing(), _group(in_features, group_size)
    if how is None or group is None:
        raise ValueError(f"int4pack does not hold {in_features} inputs in groups of {group_size}")
    rows = -(-out_features // how.block) * how.block
    scale = 2 * dtype.itemsize if dtype == torch.bfloat16 else torch.float32.itemsize
    return rows * (in_features // 2 + in_features // group * (scale + zeros))


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with a weight from `pack`. x: [M, in]. Returns [M, out] in x's dtype."""
    blocks = _check(weight)
    scale, in_features = weight.scale, weight.in_features
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [rows, {in_features}], not {[*x.shape]}")
    of_operator = x.dtype == scale.dtype == torch.bfloat16 and scale.shape[2] == 2
    if of_operator and x.shape[0] <= OPERATOR_ROWS and _operator_is_fast():
        group = in_features // scale.shape[0]
        packed = weight.packed
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, scale.contiguous())
        y = _gather(y, _known())
    else:
        dtype = product_dtype(x)
        y, wide = x.new_empty(x.shape[0], weight.packed.shape[0], dtype=dtype), x.to(dtype)
        for rows, values in _slabs(blocks, scale, weight.zero, dtype):
            torch.mm(wide, values, out=y[:, rows])
    y = y[:, : weight.out_features]
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def dequantize(weight: PackedInt, dtype: torch.dtype) -> Tensor:
    """A weight from `pack`, dequantized to [out, in] in `dtype`."""
    blocks = _check(weight)
    dense = weight.packed.new_empty(weight.out_features, weight.in_features, dtype=dtype)
    for rows, slab in _slabs(blocks, weight.scale, weight.zero, dtype):
        part = dense[rows]
        part.copy_(slab.t()[: len(part)])
    return dense


def _check(weight: PackedInt) -> Tensor:
    """The packed bytes by block, after checking all shapes: the operator would read past the end of too few scales."""
    packed, scale, zero = weight.tensors
    in_features = weight.in_features
    how = _known()
    rows = -(-weight.out_features // how.block) * how.block
    groups = scale.shape[0]
    fits = (
        packed.dtype == torch.uint8
        and packed.shape == (rows, in_features // 2)
        and scale.dtype in FLOATS
        and groups * (_group(in_features, weight.group_size) or 0) == in_features
        and scale.shape[1:] in ((rows, 1), (rows, 2))
        and (zero is None or (zero.dtype == torch.int8 and zero.shape == (groups, rows)))
    )
    if not fits:
        found = [*packed.shape], [*scale.shape], None if zero is None else [*zero.shape]
        raise ValueError(
            f"a weight of {weight.out_features} x {in_features} needs packed u8 [{rows}, {in_features // 2}] and "
            f"scales [groups, {rows}, 1 or 2] from int4pack.pack on this machine, not {found}"
        )
    return packed.contiguous().view(-1, in_features, how.block // 2)


def _known() -> Packing:
    how = packing()
    if how is None:
        raise ValueError("this torch packs 4-bit weights in an order that int4pack does not know, or not at all")
    return how


def _slabs(blocks: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields a few blocks of rows at a time: their slice and their values [in, rows], which the next one overwrites.

    Values are scaled in float32 and rounded once, as torch's rounding to bfloat16 is slow.
    """
    how = _known()
    count, n, half = blocks.shape
    groups = scale.shape[0]
    factors = _gather(scale[:, :, 0].float(), how)
    step = max(1, SLAB // (n * how.block))
    exact = blocks.new_empty(n * min(step, count) * how.block, dtype=torch.float32)
    rounded = exact if dtype == torch.float32 else torch.empty_like(exact, dtype=dtype)
    space = blocks.new_empty(2, exact.numel() // 2, dtype=torch.int16)
    for start in range(0, count, step):
        codes = _codes(blocks[start : start + step], space)
        rows = slice(start * how.block, start * how.block + codes.shape[1])
        by_group = codes.view(groups, -1, codes.shape[1])
        by_group -= 8 if zero is None else zero[:, None, rows] + 8
        values = exact[: codes.numel()].view(by_group.shape)
        values.copy_(by_group)
        values *= factors[:, None, rows]
        if dtype != torch.float32:
            rounded[: codes.numel()].copy_(exact[: codes.numel()])
        yield rows, rounded[: codes.numel()].view(codes.shape)


@cache
def _operator_is_fast() -> bool:
    """Packing by halves has vector code; packing by pairs only on ARM, else plain loops (ATen's int4mm_kernel.cpp)."""
    how = packing()
    return how is not None and (how.halves or platform.machine() in ("aarch64", "arm64"))
