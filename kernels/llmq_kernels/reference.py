"""The plain torch meaning of every operator: what each faster backend is tested against.

Packed codes are the dense bit stream that compressed-tensors calls `pack-quantized`: element i of a row occupies bits
[i·bits, (i+1)·bits) of the row, counted from the least significant bit of its first 32-bit word, and holds
code + 2^(bits−1). Eight codes fill exactly `bits` bytes, so eight at a time are spread over the bytes of a 64-bit
integer.
Words are little-endian, as on every machine torch supports in practice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """The codes of a dense bit stream.

    words: int32 [rows, ceil(n·bits/32)]; bits: 1…8; n: codes per row. Returns int8 [rows, n], in
    [−2^(bits−1), 2^(bits−1) − 1]. Raises ValueError when the dtype or the number of words does not fit.
    """
    rows, width = words.shape
    needed = -(-n * bits // 32)
    if words.dtype != torch.int32 or width != needed:
        raise ValueError(f"{n} codes of {bits} bits need int32 [{rows}, {needed}], not {words.dtype} {[*words.shape]}")
    octets = -(-n // 8)
    stream = words.reshape(-1).view(torch.uint8).view(rows, width * 4)
    if octets * bits > width * 4:
        stream = torch.nn.functional.pad(stream, (0, octets * bits - width * 4))
    lanes = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=words.device)
    lanes[:, :, :bits] = stream[:, : octets * bits].reshape(rows, octets, bits)
    spread = lanes.view(torch.int64)
    for lane in (32, 16, 8) if bits < 8 else ():
        used = bits * lane // 8
        low = lane_mask(used, 2 * lane)
        spread = (spread & low) | ((spread & (low << used)) << (lane - used))
    codes = spread.view(torch.uint8).view(rows, octets * 8)[:, :n].contiguous()
    codes -= 1 << (bits - 1)
    return codes.view(torch.int8)


def lane_mask(used: int, lane: int) -> int:
    """The lowest `used` bits of every `lane`-bit lane of a 64-bit integer."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, lane))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The weight that codes stand for: (code − zero) · scale, group by group along the last axis.

    codes: int8 [rows, n]; scale: any float [rows, groups] with groups dividing n; zero: int8 [rows, groups] or None.
    Returns float32 [rows, n].
    """
    rows, n = codes.shape
    weight = codes.to(torch.float32).view(rows, scale.shape[1], -1)
    if zero is not None:
        weight -= zero.to(torch.float32).unsqueeze(-1)
    weight *= scale.to(torch.float32).unsqueeze(-1)
    return weight.view(rows, n)


def linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    """x · Wᵀ for a packed weight W [rows, n].

    x: float [..., n]; words: int32 [rows, ceil(n·bits/32)]; scale: [rows, groups]; zero: int8 [rows, groups] or None.
    Returns [..., rows] in x's dtype; W is rounded to x's dtype first.
    """
    weight = dequantize(unpack_codes(words, bits, n), scale, zero)
    return torch.nn.functional.linear(x, weight.to(x.dtype))
