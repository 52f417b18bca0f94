"""The layout "stream": a weight's dense bit stream as it is stored, on any device, unpacked some rows at a time.

What serves where no faster layout does. The weight stays packed in memory; a slab of at most SLAB dequantized values
exists at a time, and is used while it is in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels import reference
from llmq_kernels.checks import check_stream
from llmq_kernels.products import by_slabs

SLAB = 1 << 20


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """Why this layout cannot serve such a weight: it always can, so None."""
    return None


def pack(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain form is this layout: returned as it is."""
    return words, scale, zero


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """x [M, in] → [M, out] in x's dtype, slab by slab of output rows."""
    check_stream(packed, scale, zero, bits, in_features, group_size, out_features)
    return by_slabs(x, slabs(packed, scale, zero, bits, in_features, group_size), bias, out_features)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    check_stream(packed, scale, zero, bits, in_features, group_size, out_features)
    whole = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    for part, weight in slabs(packed, scale, zero, bits, in_features, group_size):
        whole[part] = weight
    return whole


def slabs(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, group_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: which, and their weight in float32."""
    step = max(1, SLAB // in_features)
    for start in range(0, packed.shape[0], step):
        part = slice(start, start + step)
        codes = unpack(packed[part], bits, in_features)
        yield part, reference.dequantize(codes, scale[part], None if zero is None else zero[part], group_size)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """As `reference.unpack_codes`; where codes lie in whole bytes or halves of them, in fewer passes."""
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
