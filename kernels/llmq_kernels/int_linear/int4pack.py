"""4-bit weights on the CPU: torch's own operator for few rows; dequantization in cache and a matmul for many.

There is one copy of the weight, in the order that `aten::_convert_weight_to_int4pack_for_cpu` writes. The operator,
`aten::_weight_int4pack_mm_for_cpu`, dequantizes all weights again for every four rows of x, which is fastest for few
rows and very slow for many. For many rows, a few blocks of output rows at a time are therefore unpacked from the same
bytes into a slab that stays in cache, laid out as the right operand of torch's matmul.

The operator packs blocks of output rows, [block, in, block/2] bytes, each byte two codes of one input; the number of
rows per block, and which two rows share a byte, depend on torch's build and on the CPU. Both are found once per process
by packing known codes (`packing`); other orders are refused. Codes are taken apart by whole words, which leaves the two
rows of a byte side by side in a slab; what is multiplied with it is put in order at the end.

Codes of 2 and 3 bits are stored as 4-bit codes, of which they are a subset. If the operator does not support the group
size (channel, 96 …), scales are repeated for a smaller one that it supports.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmq_kernels.checks import FLOATS, check
from llmq_kernels.int_linear.dense_bits import unpack
from llmq_kernels.products import NARROW, product_dtype, row_slabs
from llmq_kernels.timing import COPIES, PROBE, fastest
from llmq_kernels.weights import PackedInt

OPERATOR_GROUPS = (256, 128, 64, 32)

# The operator is measured against slabs at these rows; beyond MOST it is slower everywhere, up to FEWEST it is faster.
FEWEST, MOST = 8, 96

# Elements of a slab: large enough that calls cost little, small enough to stay in cache. Its blocks are multiplied one
# by one, or side by side if x, which each reads again, has more than NARROW rows.
SLAB, MANY = 1 << 19, 1 << 21
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
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            except (AttributeError, NotImplementedError, RuntimeError):
                return None
            found = _codes(packed.view(-1, 32, block // 2), side_by_side=True).view(32, -1)
            if torch.equal(_in_order(found.to(torch.int16), how), codes.t().to(torch.int16)):
                return how
    return None


def _beside(columns: Tensor, how: Packing) -> Tensor:
    """Columns [n, rows] as slabs have them: the two of a byte side by side."""
    if not how.halves:
        return columns
    return columns.view(len(columns), -1, 2, how.block // 2).transpose(2, 3).reshape(columns.shape)


def _in_order(columns: Tensor, how: Packing) -> Tensor:
    """The inverse of `_beside`, for dtypes of 16 and 32 bits: a word of two columns is taken apart."""
    if not how.halves or not columns.numel():
        return columns
    number, twice = (torch.int16, torch.int32) if columns.element_size() == 2 else (torch.int32, torch.int64)
    words = columns.view(twice).view(len(columns), -1, how.block // 2)
    found = torch.empty_like(columns)
    halves = found.view(number).view(len(columns), -1, 2, how.block // 2)
    halves[:, :, 0].copy_(words)
    halves[:, :, 1].copy_(words >> (8 * columns.element_size()))
    return found


def _codes(packed: Tensor, space: Tensor | None = None, side_by_side: bool = False) -> Tensor:
    """The codes 0…15 of whole blocks. packed: u8 [blocks, in, block/2]. Returns int8 [blocks, in, block], or with
    `side_by_side` [in, blocks, block], which takes longer; the two of a byte side by side.

    Uses passes over whole words, which torch vectorizes. space: a buffer, int16 [2, at least packed.numel()].
    """
    blocks, n, half = packed.shape
    space = packed.new_empty(2, packed.numel(), dtype=torch.int16) if space is None else space[:, : packed.numel()]
    first, second = space
    if side_by_side:
        first.view(n, blocks, half).copy_(packed.transpose(0, 1))
    else:
        first.copy_(packed.view(-1))
    words = first.view(torch.int64)
    words |= torch.bitwise_left_shift(words, 4, out=second.view(torch.int64))
    words &= 0x0F0F0F0F0F0F0F0F
    in_bytes: Tensor = first.view(torch.int8)
    return in_bytes.view((n, blocks, half * 2) if side_by_side else (blocks, n, half * 2))


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
    [in/g, rows, …]: for bfloat16 the operator's pairs of scale and −zero·scale, rounded to bfloat16; for other dtypes,
    which do not use the operator, float32 scales only; zero int8 [in/g, rows], or None. Raises ValueError
    if `refusal` gives a reason, or the shapes do not fit together.
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
        packed[some] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    of_group = torch.arange(in_features // group, device=words.device) * group // group_size
    pairs = dtype == torch.bfloat16
    terms = words.new_zeros(rows, groups, 1 + pairs, dtype=dtype if pairs else torch.float32)
    terms[:out, :, 0] = scale
    if zero is not None and pairs:
        terms[:out, :, 1] = -zero.float() * terms[:out, :, 0].float()
    terms = terms.transpose(0, 1)[of_group].contiguous()
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
    of_operator = x.dtype == scale.dtype == torch.bfloat16 and scale.shape[2] == 2 and _operator_is_fast()
    if of_operator and (x.shape[0] <= FEWEST or x.shape[0] <= MOST and x.shape[0] <= _operator_rows()):
        y = _by_operator(x, weight)
    else:
        y = _by_slabs(x, weight, blocks)
    if y.shape[1] > weight.out_features:
        y = y[:, : weight.out_features]
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def _by_operator(x: Tensor, weight: PackedInt) -> Tensor:
    """x · Wᵀ [M, rows] by torch's operator."""
    scale = weight.scale.contiguous()
    group = weight.in_features // len(scale)
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight.packed, group, scale)
    return y


def _by_slabs(x: Tensor, weight: PackedInt, blocks: Tensor) -> Tensor:
    """x · Wᵀ [M, rows] in the dtype of the product."""
    dtype = product_dtype(x)
    y, wide = x.new_empty(x.shape[0], weight.packed.shape[0], dtype=dtype), x.to(dtype)
    for rows, values in _slabs(blocks, weight.scale, weight.zero, dtype, len(x) > NARROW):
        torch.mm(wide, values, out=y[:, rows])
    if _known().halves:
        for some in row_slabs(len(y), y.shape[1], SLAB):
            y[some] = _in_order(y[some], _known())
    return y


@cache
def _operator_rows() -> int:
    """The rows for which operator and slabs take the same time on this processor, by timing them at a few.

    Both are linear in rows: the operator from nothing, slabs from the time of dequantizing.
    """
    bits, group, (out, width) = 4, OPERATOR_GROUPS[1], PROBE
    words = torch.zeros(out, width * bits // 32, dtype=torch.int32, device="cpu")
    scale = torch.ones(out, width // group, dtype=torch.bfloat16, device="cpu")
    weight = pack(PackedInt(words, scale, None, bits, out, width, group), torch.bfloat16)
    copies = torch.stack([weight.packed] * COPIES)
    few, many = (torch.ones(rows, width, dtype=torch.bfloat16, device="cpu") for rows in (2 * FEWEST, MOST))

    def slabs(x: Tensor, packed: Tensor) -> Tensor:
        one = replace(weight, packed=packed)
        return _by_slabs(x, one, _check(one))

    a_row = fastest(lambda x, packed: _by_operator(x, replace(weight, packed=packed)), few, copies) / len(few)
    at_few, at_many = fastest(slabs, few, copies), fastest(slabs, many, copies)
    a_row_more = (at_many - at_few) / (len(many) - len(few))
    if a_row <= a_row_more:
        return MOST
    return int((at_few - a_row_more * len(few)) / (a_row - a_row_more))


def dequantize(weight: PackedInt, dtype: torch.dtype) -> Tensor:
    """A weight from `pack`, dequantized to [out, in] in `dtype`."""
    blocks, how = _check(weight), _known()
    dense = weight.packed.new_empty(weight.out_features, weight.in_features, dtype=dtype)
    for rows, slab in _slabs(blocks, weight.scale, weight.zero, dtype):
        part = dense[rows]
        part.copy_(_in_order(slab, how).t()[: len(part)])
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


def _slabs(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, side_by_side: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yields a block of rows, or with `side_by_side` several, at a time: their slice and their values [in, rows], in
    the order of `_beside`, which the next ones overwrite.

    Values are scaled in float32 and rounded once, as torch's rounding to bfloat16 is slow.
    """
    how = _known()
    count, n, half = blocks.shape
    width, groups = how.block, scale.shape[0]
    factors = _by_block(scale[:, :, 0].to(torch.float32), how)
    shifts = None if zero is None else _by_block(zero, how) + 8
    step = min(max(1, (MANY if side_by_side else SLAB) // (n * width)), count)
    exact = blocks.new_empty(n * step * width, dtype=torch.float32)
    rounded = exact if dtype == torch.float32 else torch.empty_like(exact, dtype=dtype)
    space = blocks.new_empty(2, n * step * half, dtype=torch.int16)
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        codes = _codes(blocks[some], space, side_by_side)
        factor, shift = factors[some], None if shifts is None else shifts[some]
        if side_by_side:
            factor, shift = _turned(factor), None if shift is None else _turned(shift)
        by_group = codes.view(*factor.shape[:-2], n // groups, factor.shape[-1])
        by_group -= 8 if shift is None else shift
        values = exact[: codes.numel()].view(by_group.shape)
        values.copy_(by_group)
        values *= factor
        if dtype != torch.float32:
            rounded[: codes.numel()].copy_(exact[: codes.numel()])
        whole = rounded[: codes.numel()]
        if side_by_side:
            yield slice(some.start * width, some.stop * width), whole.view(n, -1)
        else:
            for at, block in enumerate(whole.view(-1, n, width), start):
                yield slice(at * width, (at + 1) * width), block


def _by_block(terms: Tensor, how: Packing) -> Tensor:
    """Terms [groups, rows] of groups and rows as [blocks, groups, 1, block], in the order of `_beside`."""
    return _beside(terms, how).view(len(terms), -1, 1, how.block).transpose(0, 1).contiguous()


def _turned(terms: Tensor) -> Tensor:
    """Terms of `_by_block` as [groups, 1, rows]."""
    return terms.permute(1, 2, 0, 3).reshape(terms.shape[1], 1, -1)


@cache
def _operator_is_fast() -> bool:
    """Packing by halves has vector code; packing by pairs only on ARM, else plain loops (ATen's int4mm_kernel.cpp)."""
    how = packing()
    return how is not None and (how.halves or platform.machine() in ("aarch64", "arm64"))
