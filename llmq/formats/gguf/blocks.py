"""The bytes of GGUF's blocks: from the codes and scales of a quantized weight, and back to numbers.

ggml-common.h has the blocks, ggml-quants.c what they mean; d and m are float16.

| type | value | codes of a block |
|---|---|---|
| Q4_0, Q5_0 | d · (q − 8), d · (q − 16) | j in the low half of byte j, j + 16 in the high; fifth bits before |
| Q4_1, Q5_1 | d · q + m | the same |
| Q8_0 | d · q, signed | a byte each |
| Q2_0 | d · (q − 1) | four in a byte, the first lowest |
| TQ2_0 | d · (q − 1), q below 3 | byte j of 32 has values j, j + 32, j + 64, j + 96 |
| TQ1_0 | d · (q − 1), q below 3 | five in a byte, as the fraction of 256 that their number in base 3 is of 243 |
| MXFP4 | 2^(e − 127) · e2m1 | as Q4_0 |
| NVFP4 | e4m3 · e2m1, times a scale of the whole tensor | four groups of 16, value j beside j + 8 |

A weight of few bits fits types of more: which of all `fitting` says, the smallest first. What a block shares is exact
but for scales that float16 does not hold, and for m = −zero · d, which has more bits than it: then it is rounded to
nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.gguf import kquants
from llmq.formats.gguf.types import TYPES, BlockType
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.kquants import KWeight
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS

TERNARY = {"TQ1_0": (-1, 1), "TQ2_0": (-1, 1)}
SYMMETRIC = TERNARY | {"Q2_0": (-1, 2), "Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
"""Types without m → the lowest and the highest multiple of d."""
AFFINE = ("Q4_1", "Q5_1")
FLOATS = {"MXFP4": 32, "NVFP4": 16}
"""Types of FP4 codes → the values that share a scale."""
SCALED = ("NVFP4",)
"""Types that have a scale of the whole tensor beside them."""
K_QUANTS = {grid.layout: grid for grid in GRIDS.values() if grid.layout in TYPES}
"""Types of two levels of scales → the grids that alone fill them."""
ORDER = ("TQ1_0", "TQ2_0", "Q2_0", "MXFP4", "Q4_0", "NVFP4", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS)
"""All types that are written, smallest first, but for K-quants, which hold no other's codes."""
HALF = torch.finfo(torch.float16)
THREES = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class Span:
    """What decides which types hold a weight.

    group: inputs that share a scale; low, high: of code − zero; bits: of codes; layout: of FP4 codes, '' for integers.
    """

    width: int
    group: int
    low: int
    high: int
    bits: int
    layout: str = ""


def span(weight: QuantizedWeight | KWeight) -> Span:
    """What a weight needs of a type."""
    if isinstance(weight, KWeight):
        rules = weight.scheme.rules
        return Span(weight.codes.shape[1], rules.span, 0, 0, weight.scheme.bits, rules.layout)
    width, layout = weight.codes.shape[1], weight.scheme.rules.layout
    group = width // weight.scale.shape[1]
    if layout:
        return Span(width, group, 0, 0, weight.scheme.bits, layout)
    found = values(weight)
    return Span(width, group, int(found.min()), int(found.max()), weight.scheme.bits)


def values(weight: QuantizedWeight) -> Tensor:
    """The multiples of the scale that a weight of integers has: code − zero, int16 [out, in]."""
    points = rounding_of(weight.scheme.rules).decode(weight.codes, weight.scheme).to(torch.int16)
    if weight.zero is None:
        return points
    return (points.view(*weight.scale.shape, -1) - weight.zero.unsqueeze(-1)).flatten(1)


def fitting(need: Span) -> list[str]:
    """The types that hold such a weight, smallest first; none if the group is not a multiple of a type's."""
    return [name for name in ORDER if _holds(name, need)]


def _holds(name: str, need: Span) -> bool:
    if need.width % TYPES[name].values:
        return False
    if name in K_QUANTS:
        return need.layout == name
    if name in FLOATS:
        return need.layout == f"{name.lower()}-pack-quantized" and need.group == FLOATS[name]
    if need.layout or need.group % TYPES[name].values:
        return False
    if name in AFFINE:
        return need.bits <= TYPES[name].bits
    low, high = SYMMETRIC[name]
    return (low <= need.low and need.high <= high) or (low <= -need.high and -need.low <= high)


def refusal(need: Span) -> str:
    """Why no type holds such a weight, and the way out."""
    again = "quantize again with --recipe gguf-q4_0 (or gguf-q2_0, gguf-q5_0, gguf-q8_0)"
    if need.layout:
        return f"no GGUF type holds {need.layout} in groups of {need.group}: {again}, or --grid mxfp4"
    if need.width % 32:
        return f"its {need.width} inputs are no multiple of 32, as GGUF's blocks need: --keep it"
    if need.group % 32:
        return f"groups of {need.group} are no multiple of 32, as GGUF's blocks need: {again}"
    return f"no GGUF type holds {need.bits} bits with zero points: {again}, or use --symmetric"


def pack(name: str, weight: QuantizedWeight | KWeight) -> Tensor:
    """The blocks of a weight [out, in] that the type holds: uint8 [out, bytes of a row].

    Raises LlmqError if a scale is too large for float16.
    """
    kind, (rows, width) = TYPES[name], weight.codes.shape
    if isinstance(weight, KWeight):
        return kquants.pack(weight)
    if name in FLOATS:
        return _pack_floats(name, weight)
    blocks = width // kind.values
    scale = weight.scale.to(torch.float32)
    scale = scale.repeat_interleave(blocks // scale.shape[1], dim=1)
    if name in AFFINE:
        zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
        codes = (weight.codes.to(torch.int16) - weight.scheme.qmin).view(rows, blocks, kind.values).to(torch.uint8)
        lowest = (weight.scheme.qmin - zero.to(torch.float32)) * weight.scale.to(torch.float32)
        lowest = lowest.repeat_interleave(blocks // lowest.shape[1], dim=1)
        shared = [_half(scale), _half(lowest)]
    else:
        found, (low, high) = values(weight), SYMMETRIC[name]
        if int(found.min()) < low or int(found.max()) > high:
            found, scale = -found, -scale
        codes, shared = found.view(rows, blocks, kind.values), [_half(scale)]
        codes = codes.to(torch.int8).view(torch.uint8) if name == "Q8_0" else (codes - low).to(torch.uint8)
    # Only the ternary types have d behind the codes.
    parts = [*_codes(name, codes), *shared] if name in TERNARY else [*shared, *_codes(name, codes)]
    return torch.cat(parts, dim=-1).view(rows, -1)


def _half(numbers: Tensor) -> Tensor:
    """float32 [rows, blocks] → the bytes of float16, uint8 [rows, blocks, 2]. Raises LlmqError if one is too large."""
    if bool((numbers.abs() > HALF.max).any()):
        largest = float(numbers.abs().max())
        raise LlmqError(f"scales up to {largest:.3g} are too large for float16, as GGUF has them: --keep the weight")
    return numbers.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _codes(name: str, codes: Tensor) -> list[Tensor]:
    """The bytes of codes, uint8 [rows, blocks, values]."""
    rows, blocks, count = codes.shape
    if name in ("Q4_0", "Q4_1"):
        return [_nibbles(codes)]
    if name in ("Q5_0", "Q5_1"):
        eights = (codes >> 4).view(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8)
        return [eights.sum(-1, dtype=torch.uint8), _nibbles(codes & 15)]
    if name == "Q2_0":
        return [_joined(codes.view(rows, blocks, -1, 4))]
    if name == "TQ2_0":
        return [_joined(codes.view(rows, blocks, -1, 4, 32).transpose(-1, -2)).flatten(2)]
    if name == "TQ1_0":
        return [
            _trits(codes[..., :160].view(rows, blocks, 5, 32)),
            _trits(codes[..., 160:240].view(rows, blocks, 5, 16)),
            _trits(codes[..., 240:].view(rows, blocks, 4, 4)),
        ]
    return [codes]


def _nibbles(codes: Tensor) -> Tensor:
    """The first half of a block in the low halves of bytes, the second in the high: uint8 [..., n] → [..., n/2]."""
    first, second = codes.chunk(2, dim=-1)
    return first | second << 4


def _joined(codes: Tensor) -> Tensor:
    """Four codes of two bits in a byte, the first lowest: uint8 [..., 4] → [...]."""
    return codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6


def _trits(codes: Tensor) -> Tensor:
    """Numbers in base 3 along the axis before the last, as fractions of 256, rounded up: [..., n, m] → [..., m]."""
    digits = torch.tensor(THREES[: codes.shape[-2]], dtype=torch.int32).unsqueeze(-1)
    number = (codes.to(torch.int32) * digits).sum(-2)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _pack_floats(name: str, weight: QuantizedWeight) -> Tensor:
    """See `pack`: blocks of FP4 codes."""
    kind, (rows, width), group = TYPES[name], weight.codes.shape, FLOATS[name]
    blocks = width // kind.values
    codes = _nibbles(weight.codes.view(rows, blocks, kind.values // group, group)).flatten(2)
    scale = weight.scale.to(torch.float32)
    if name == "NVFP4":
        stored = (scale * weight.stored_scale).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        stored = (torch.frexp(scale)[1] - 1 + 127).clamp(0, 254).to(torch.uint8)
    return torch.cat([stored.view(rows, blocks, -1), codes], dim=-1).view(rows, -1)


def tensor_scale(weight: QuantizedWeight | KWeight) -> float:
    """What a whole tensor of a type in SCALED is multiplied by besides."""
    assert isinstance(weight, QuantizedWeight)
    return float(1 / weight.stored_scale)


def round_q8(dense: Tensor) -> Tensor:
    """A weight [out, in] rounded to Q8_0, as llama.cpp does: d = largest magnitude / 127. uint8 [out, bytes]."""
    rows, width = dense.shape
    part = dense.to(torch.float32).view(rows, -1, 32)
    scale = part.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, part / scale, 0.0).round_().to(torch.int8).view(torch.uint8)
    return torch.cat([_half(scale.squeeze(-1)), codes], dim=-1).view(rows, -1)


LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack(name: str, blocks: Tensor) -> Tensor:
    """The numbers of blocks of a type that is written, uint8 [rows, bytes of a row] → float32 [rows, in].

    NVFP4 without the tensor's own scale. Raises LlmqError for another type.
    """
    kind, rows = TYPES[name], len(blocks)
    if name not in ORDER:
        raise LlmqError(f"llmq does not read GGUF tensors of type {name}")
    if name in K_QUANTS:
        return kquants.unpack(blocks, scheme_of(name)).dequantize(torch.float32)
    data = blocks.view(rows, -1, kind.nbytes)
    if name in FLOATS:
        return _unpack_floats(name, data).view(rows, -1)
    if name in TERNARY:
        return (_unpack_ternary(name, data[..., :-2]) * _numbers(data[..., -2:])).view(rows, -1)
    first, rest = _numbers(data[..., :2]), data[..., 2:]
    if name == "Q8_0":
        return (rest.contiguous().view(torch.int8).to(torch.float32) * first).view(rows, -1)
    if name == "Q2_0":
        found = (rest.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(2)
        return ((found.to(torch.float32) - 1) * first).view(rows, -1)
    lowest, rest = (_numbers(rest[..., :2]), rest[..., 2:]) if name in AFFINE else (None, rest)
    codes = torch.cat([rest[..., -16:] & 15, rest[..., -16:] >> 4], dim=-1)
    if kind.bits == 5:
        codes = codes | (rest[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4
    found = codes.to(torch.float32)
    made = (found + SYMMETRIC[name][0]) * first if lowest is None else found * first + lowest
    return made.view(rows, -1)


def scheme_of(name: str) -> Scheme:
    """The scheme whose weights K-quants of a type are."""
    rules = K_QUANTS[name]
    return Scheme(rules.bits[0], rules.group_sizes[0], not rules.minima, rules.name)


def scales(blocks: Tensor, kind: BlockType) -> Tensor:
    """The float16 numbers that blocks begin with, uint8 [rows, bytes of a row] → float32 [rows, blocks]."""
    return _numbers(blocks.view(len(blocks), -1, kind.nbytes)[..., :2]).squeeze(-1)


def _numbers(data: Tensor) -> Tensor:
    """The float16 numbers of bytes, uint8 [..., 2] → float32 [..., 1]."""
    return data.contiguous().view(torch.float16).to(torch.float32)


def _unpack_ternary(name: str, data: Tensor) -> Tensor:
    """Multiples of d, float32 [rows, blocks, 256], of codes of ternary types."""
    if name == "TQ2_0":
        codes = data.contiguous().view(*data.shape[:2], 2, 1, 32)
        codes = codes >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1) & 3
        return codes.flatten(2).to(torch.float32).sub_(1)
    parts = []
    for part, count in ((data[..., :32], 5), (data[..., 32:48], 5), (data[..., 48:], 4)):
        # The digit at a place is what is left of the fraction there, times 3.
        moved = part.unsqueeze(-2).to(torch.int32) * torch.tensor([3**at for at in range(count)]).unsqueeze(-1) % 256
        parts.append((moved * 3 // 256).flatten(2))
    return torch.cat(parts, dim=-1).to(torch.float32).sub_(1)


def _unpack_floats(name: str, data: Tensor) -> Tensor:
    """See `unpack`: [rows, blocks, values]."""
    group, count = FLOATS[name], TYPES[name].values // FLOATS[name]
    stored = data[..., :count].contiguous()
    packed = data[..., count:].contiguous().view(*data.shape[:2], count, group // 2)
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int64)
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)])
    if name == "NVFP4":
        scale = stored.view(torch.float8_e4m3fn).to(torch.float32)
    else:
        scale = torch.exp2(stored.to(torch.float32) - 127)
    return (levels[codes] * scale.unsqueeze(-1)).flatten(2)
