"""Pack integer codes into a dense little-endian bit stream, and back.

`llmq_kernels.int_linear.reference` describes it. It is that of compressed-tensors' pack-quantized format; tests compare
the two bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.machine import by_rows
from llmq_kernels.int_linear import dense_bits, reference
from llmq_kernels.int_linear.reference import lane_mask

__all__ = ["pack_codes", "pack_columns", "packed_width", "unpack_codes", "unpack_columns"]

CHUNK = 1 << 18
"""Codes at a time, so that temporaries stay in the processor's cache."""


def packed_width(n: int, bits: int) -> int:
    """How many 32-bit words hold n codes."""
    return -(-n * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs each row of codes.

    codes: int8 [rows, n] in [−2^(bits−1), 2^(bits−1) − 1]; bits: 1…8. Returns int32 [rows, ceil(n·bits/32)]; unused
    high bits of the last word are 0. Raises LlmqError for another dtype.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise LlmqError(f"codes to pack must be int8 with two axes, not {codes.dtype} {[*codes.shape]}")
    rows, n = codes.shape
    words = torch.empty(rows, packed_width(n, bits), dtype=torch.int32, device=codes.device)
    pack = _pack_pairs if bits == 4 and n % 8 == 0 else _pack_rows

    def work(some: slice) -> None:
        words[some] = pack(codes[some], bits)

    by_rows(rows, max(1, CHUNK // max(n, 1)), work, codes.device)
    return words


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_codes`: int32 [rows, ceil(n·bits/32)] → int8 [rows, n]. Raises ValueError."""
    rows = len(words)
    if words.dtype != torch.int32 or words.shape[1] != packed_width(n, bits):
        return reference.unpack_codes(words, bits, n)
    codes = torch.empty(rows, n, dtype=torch.int8, device=words.device)

    def work(some: slice) -> None:
        # A row of one word may have any stride, which a view of its bytes does not take.
        part = words[some].reshape(-1).view(-1, words.shape[1])
        codes[some] = dense_bits.unpack(part, bits, n)

    by_rows(rows, max(1, CHUNK // max(n, 1)), work, words.device)
    return codes


def _pack_pairs(codes: Tensor, bits: int) -> Tensor:
    """One chunk of `pack_codes` for 4 bits and whole words: two codes, the bytes of a 16-bit integer, make a byte."""
    # Memory of its own: a row alone may have any stride, which a view of its bytes does not take.
    stored = torch.add(codes, 8, out=torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)).view(torch.int16)
    return ((stored >> 4) | stored).to(torch.uint8).view(torch.int32)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """One chunk of `pack_codes`: eight codes, one per byte of a 64-bit integer, are shifted together in three steps."""
    rows, n = codes.shape
    octets, width = -(-n // 8), packed_width(n, bits)
    stored = torch.zeros(rows, octets * 8, dtype=torch.uint8, device=codes.device)
    # Two's complement plus the offset, modulo 2^bits, is the stored code: no wider integers are needed.
    stored[:, :n] = codes.view(torch.uint8)
    stored[:, :n] += 1 << (bits - 1)
    stored[:, :n] &= (1 << bits) - 1
    lanes = stored.view(torch.int64)
    for lane in (8, 16, 32) if bits < 8 else ():
        used = bits * lane // 8
        low = lane_mask(used, 2 * lane)
        lanes = (lanes & low) | ((lanes >> (lane - used)) & (low << used))
    stream = torch.zeros(rows, max(octets * bits, width * 4), dtype=torch.uint8, device=codes.device)
    dense = lanes.view(torch.uint8).view(rows, octets, 8)[:, :, :bits]
    stream[:, : octets * bits] = dense.reshape(rows, octets * bits)
    return stream[:, : width * 4].reshape(-1).view(torch.int32).view(rows, width)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Packs each column: int8 [n, columns] → int32 [ceil(n·bits/32), columns]. Zero points are stored this way."""
    return pack_codes(codes.t().contiguous(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_columns`: int32 [ceil(n·bits/32), columns] → int8 [n, columns]."""
    return unpack_codes(words.t().contiguous(), bits, n).t().contiguous()
