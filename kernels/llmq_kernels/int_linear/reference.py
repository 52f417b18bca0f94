"""The reference of integer weights in plain torch; each faster backend is tested against it.

Packed codes are the dense bit stream that compressed-tensors calls `pack-quantized`: element i of a row occupies bits
[i·bits, (i+1)·bits) of the row, counted from the least significant bit of its first 32-bit word, and holds
code + 2^(bits−1). Eight codes fill exactly `bits` bytes, so eight codes at a time are spread over the bytes of a 64-bit
integer.
Words are little-endian, as on every machine torch supports in practice.

A weight is always computed in float32 and rounded once to the product's dtype, which is the input's own except for
float16 on a CPU (`products`); torch's own matrix product accumulates in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """The codes of a dense bit stream.

    words: int32 [rows, ceil(n·bits/32)]; bits: 1…8; n: codes per row. Returns int8 [rows, n], in
    [−2^(bits−1), 2^(bits−1) − 1]. Raises ValueError if the dtype or the number of words does not fit.
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


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None, group_size: int | None = None) -> Tensor:
    """The dequantized weight: (code − zero) · scale, in groups along the last axis.

    codes: int8 [rows, n]; scale: any float [rows, groups]; zero: int8 [rows, groups] or None; group_size: codes per
    group, by default n / groups; if given, the last group may be shorter. Returns float32 [rows, n].
    """
    rows, n = codes.shape
    if group_size is not None and n % group_size:
        whole = scale.shape[1] * group_size
        return dequantize(torch.nn.functional.pad(codes, (0, whole - n)), scale, zero)[:, :n].contiguous()
    weight = codes.to(torch.float32).view(rows, scale.shape[1], -1)
    if zero is not None:
        weight -= zero.to(torch.float32).unsqueeze(-1)
    weight *= scale.to(torch.float32).unsqueeze(-1)
    return weight.view(rows, n)


def int_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x · Wᵀ + bias for integer weights W [out, n] in a dense bit stream.

    x: float [..., n]; words: int32 [out, ceil(n·bits/32)]; scale: float [out, ceil(n/group_size)]; zero: int8 like
    scale, or None; bias: [out] or None. Returns [..., out] in x's dtype.
    """
    weight = dequantize(unpack_codes(words, bits, x.shape[-1]), scale, zero, group_size)
    return products.linear(x, weight, bias)
