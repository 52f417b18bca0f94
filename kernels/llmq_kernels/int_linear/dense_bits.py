"""The layout dense_bits: the plain form itself, on any device, unpacked some rows at a time.

Used if no faster layout supports the weight. The weight stays packed in memory; a slab of at most SLAB values is
dequantized at a time, and multiplied while it is in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.checks import FLOATS, check, check_sizes
from llmq_kernels.int_linear import reference
from llmq_kernels.weights import PackedInt

SLAB = 1 << 20


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """None: this layout supports every weight."""
    return None


def pack(plain: PackedInt, dtype: torch.dtype) -> PackedInt:
    """Returns the plain form unchanged, which is this layout."""
    return plain


def nbytes(dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int, zeros: bool) -> int:
    """See `Layout.nbytes`: words, and a scale and perhaps a zero point for each group."""
    groups = -(-in_features // group_size)
    return out_features * (4 * -(-in_features * bits // 32) + groups * (dtype.itemsize + zeros))


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
    """x [M, in] → [M, out] in x's dtype, slab by slab of output rows."""
    check_plain(weight)
    return products.by_slabs(x, slabs(weight), bias, weight.out_features)


def dequantize(weight: PackedInt, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    check_plain(weight)
    shape = weight.out_features, weight.in_features
    return products.whole(slabs(weight), shape, dtype, weight.packed.device)


def check_plain(weight: PackedInt) -> None:
    """Check that codes, scales and zero points of a plain form fit together. Raises TypeError or ValueError."""
    check_sizes(weight.bits, weight.group_size)
    words = -(-weight.in_features * weight.bits // 32)
    check("words", weight.packed, torch.int32, (weight.out_features, words))
    check("scale", weight.scale, FLOATS, (weight.out_features, -(-weight.in_features // weight.group_size)))
    if weight.zero is not None:
        check("zero", weight.zero, torch.int8, tuple(weight.scale.shape))


def slabs(weight: PackedInt) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows at a time: their slice, and their weight in float32."""
    for rows in products.row_slabs(weight.out_features, weight.in_features, SLAB):
        codes = unpack(weight.packed[rows], weight.bits, weight.in_features)
        zero = None if weight.zero is None else weight.zero[rows]
        yield rows, reference.dequantize(codes, weight.scale[rows], zero, weight.group_size)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """As `reference.unpack_codes`, with fewer passes for 8 and 4 bits."""
    if bits not in (4, 8):
        return reference.unpack_codes(words, bits, n)
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets[:, :n] ^ 128).view(torch.int8)
    pairs = octets[:, : -(-n // 2)].to(torch.int16)
    pairs |= pairs << 4
    pairs &= 0x0F0F
    codes = pairs.view(torch.int8)
    codes -= 8
    return codes[:, :n].contiguous()
