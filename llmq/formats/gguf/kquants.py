"""The bytes of K-quants' blocks of 256 weights, from the parts of a weight and back.

ggml-common.h has the blocks, ggml-quants.c the order of their bits (dequantize_row_q2_K …). d and e are float16; s and
m are the multiples of them of each group.

| type | bytes of a block, in order |
|---|---|
| Q2_K | 16: s in the low half, m in the high; 64: codes; d; e |
| Q3_K | 32: third bits; 64: two bits of codes; 12: s + 32 in six bits; d |
| Q4_K | d; e; 12: s and m in six bits; 128: codes |
| Q5_K | d; e; 12: s and m in six bits; 32: fifth bits; 128: four bits of codes |
| Q6_K | 128: four bits of codes + 32; 64: two more bits; 16: s, signed; d |

Q3_K's codes are stored + 4. Two bits of codes: byte j of 32 has those of values j, j + 32, j + 64 and j + 96, for each
half of a block. Four bits: byte j of 32 has values j and j + 32, for each quarter; in Q6_K byte j of 64 has values j
and j + 64, for each half. Single bits: bit i of byte j of 32 is of value 32 · i + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats.gguf.types import TYPES
from llmq.grids.kquants import KWeight, Levels
from llmq.grids.scheme import Scheme

VALUES = 256


def pack(weight: KWeight) -> Tensor:
    """The blocks of a weight [out, in]: uint8 [out, bytes of a row]."""
    levels, bits = weight.levels, weight.scheme.bits
    rows, blocks = levels.d.shape
    offset = 1 << (bits - 1) if weight.scheme.symmetric else 0
    codes = (weight.codes.to(torch.int16) + offset).to(torch.uint8).view(rows, blocks, VALUES)
    whole = levels.whole.view(rows, blocks, -1)
    d = _bytes(levels.d)
    if bits == 6:
        parts = [_nibbles(codes & 15, 64), _crumbs(codes >> 4), whole.view(torch.uint8), d]
    elif bits == 3:
        stored = (whole.to(torch.int16) + 32).to(torch.uint8)
        parts = [_single(codes >> 2), _crumbs(codes & 3), _sixes_of_16(stored), d]
    else:
        assert levels.lowest is not None and levels.e is not None
        scales, minima = whole.to(torch.uint8), levels.lowest.to(torch.uint8).view(rows, blocks, -1)
        e = _bytes(levels.e)
        if bits == 2:
            parts = [scales | minima << 4, _crumbs(codes), d, e]
        else:
            fifth = [_single(codes >> 4)] if bits == 5 else []
            parts = [d, e, _sixes_of_8(scales, minima), *fifth, _nibbles(codes & 15, 32)]
    return torch.cat(parts, dim=-1).view(rows, -1)


def unpack(stored: Tensor, scheme: Scheme) -> KWeight:
    """The inverse of `pack`. stored: uint8 [out, bytes of a row], a whole number of blocks of the scheme's type."""
    bits = scheme.bits
    rows, data = len(stored), stored.view(len(stored), -1, TYPES[scheme.rules.layout].nbytes)
    if bits == 6:
        codes = _of_nibbles(data[..., :128], 64) | _of_crumbs(data[..., 128:192]) << 4
        found = Levels(data[..., 192:208].contiguous().view(torch.int8).flatten(1), _half(data[..., 208:]))
    elif bits == 3:
        codes = _of_crumbs(data[..., 32:96]) | _of_single(data[..., :32]) << 2
        whole = _of_sixes_of_16(data[..., 96:108]).to(torch.int16) - 32
        found = Levels(whole.to(torch.int8).flatten(1), _half(data[..., 108:]))
    elif bits == 2:
        codes, both = _of_crumbs(data[..., 16:80]), data[..., :16]
        found = _levels(both & 15, data[..., 80:82], both >> 4, data[..., 82:])
    else:
        codes = _of_nibbles(data[..., -128:], 32)
        if bits == 5:
            codes = codes | _of_single(data[..., 16:48]) << 4
        scales, minima = _of_sixes_of_8(data[..., 4:16])
        found = _levels(scales, data[..., :2], minima, data[..., 2:4])
    offset = 1 << (bits - 1) if scheme.symmetric else 0
    return KWeight((codes.to(torch.int16) - offset).to(torch.int8).view(rows, -1), found, scheme)


def _levels(scales: Tensor, d: Tensor, minima: Tensor, e: Tensor) -> Levels:
    return Levels(scales.to(torch.int8).flatten(1), _half(d), minima.to(torch.int8).flatten(1), _half(e))


def _bytes(numbers: Tensor) -> Tensor:
    """float16 [rows, blocks] → uint8 [rows, blocks, 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _half(data: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2] → float16 [rows, blocks]."""
    return data.contiguous().view(torch.float16).squeeze(-1)


def _shifts(step: int) -> Tensor:
    return torch.arange(0, 8, step, dtype=torch.uint8).unsqueeze(-1)


def _joined(codes: Tensor, step: int) -> Tensor:
    """Codes of `step` bits along the axis before the last, the first lowest: uint8 [..., 8 / step, n] → [..., n]."""
    return (codes << _shifts(step)).sum(-2, dtype=torch.uint8)


def _nibbles(codes: Tensor, size: int) -> Tensor:
    return _joined(torch.unflatten(codes, -1, (-1, 2, size)), 4).flatten(2)


def _of_nibbles(data: Tensor, size: int) -> Tensor:
    return (torch.unflatten(data, -1, (-1, 1, size)) >> _shifts(4) & 15).flatten(2)


def _crumbs(codes: Tensor) -> Tensor:
    return _joined(torch.unflatten(codes, -1, (2, 4, 32)), 2).flatten(2)


def _of_crumbs(data: Tensor) -> Tensor:
    return (torch.unflatten(data, -1, (2, 1, 32)) >> _shifts(2) & 3).flatten(2)


def _single(bits: Tensor) -> Tensor:
    return _joined(torch.unflatten(bits, -1, (8, 32)), 1)


def _of_single(data: Tensor) -> Tensor:
    return (data.unsqueeze(-2) >> _shifts(1) & 1).flatten(2)


def _sixes_of_16(numbers: Tensor) -> Tensor:
    """16 numbers of six bits in 12 bytes: low bits of j and j + 8 in byte j, high bits of j, j + 4 … in byte 8 + j."""
    low, high = numbers & 15, numbers >> 4
    return torch.cat([_nibbles(low, 8), _joined(torch.unflatten(high, -1, (4, 4)), 2)], dim=-1)


def _of_sixes_of_16(data: Tensor) -> Tensor:
    high = (data[..., 8:].unsqueeze(-2) >> _shifts(2) & 3).flatten(2)
    return _of_nibbles(data[..., :8], 8) | high << 4


def _sixes_of_8(scales: Tensor, minima: Tensor) -> Tensor:
    """Two times 8 numbers of six bits in 12 bytes: the first four of each whole in bytes 0 to 7, the high bits of whose
    bytes are those of the last four, the low halves of which are in bytes 8 to 11."""
    whole = torch.cat([scales[..., :4], minima[..., :4]], dim=-1)
    last = torch.cat([scales[..., 4:], minima[..., 4:]], dim=-1)
    return torch.cat([whole | last >> 4 << 6, _nibbles(last & 15, 4)], dim=-1)


def _of_sixes_of_8(data: Tensor) -> tuple[Tensor, Tensor]:
    whole = data[..., :8] & 63
    last = _of_nibbles(data[..., 8:], 4) | data[..., :8] >> 6 << 4
    scales, minima = (torch.cat([whole[..., at : at + 4], last[..., at : at + 4]], dim=-1) for at in (0, 4))
    return scales, minima
