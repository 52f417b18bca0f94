"""Levels of a grid, the same for all rows, and a scale for each group: W = level · scale.

`weight_levels` float32 [levels], ascending; `weight_scale` [out, groups] in the model's dtype; and the indices of
levels: `weight_codes`, a dense stream of bits as compressed-tensors packs integers; three levels are `weight_trits`
uint8 [out, ceil(in / 5)] instead, five to a byte: Σ index · 3^k, the first with k = 0 (1.6 bits for each, of log₂ 3 =
1.585). What a row's last byte has too many is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Spec, Unclear
from llmq.formats.codebook.learned import CODES, LEVELS, SCALE, SHAPE
from llmq.formats.codebook.learned import indices as of_bits
from llmq.formats.packing import pack_codes, packed_width
from llmq.formats.plain import FLOATS, CodebookWeight, Entry, VectorsWeight, part_of_rows
from llmq.grids.base import QuantizedWeight, check_range, rounding_of
from llmq.grids.scheme import Scheme

TRITS = "weight_trits"
TRITS_IN_BYTE, BITS_IN_BYTE = 5, 8


def levels_of(scheme: Scheme) -> Tensor:
    """The levels of a scheme's grid, float32 ascending."""
    return rounding_of(scheme.rules).levels(scheme, torch.device("cpu"))


def bits_of(levels: int) -> int:
    """The bits of an index of a level."""
    return (levels - 1).bit_length()


def _stored(rows: int, width: int, levels: int) -> tuple[str, torch.dtype, tuple[int, int]]:
    """The tensor that holds the indices: suffix, dtype and shape."""
    if levels == 3:
        return TRITS, torch.uint8, (rows, -(-width // TRITS_IN_BYTE))
    return CODES, torch.int32, (rows, packed_width(width, bits_of(levels)))


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    check_range("mse", scheme, width)
    levels = len(levels_of(scheme))
    if levels > 3 and (scheme.group_size or width) % 2:
        raise LlmqError(f"a {scheme} weight of {width} inputs needs groups of an even size: codes are read in pairs")
    suffix, dtype, size = _stored(rows, width, levels)
    return {
        suffix: (dtype, size),
        LEVELS: (torch.float32, (levels,)),
        SCALE: (scale_dtype, (rows, scheme.groups(width))),
        SHAPE: (torch.int64, (2,)),
    }


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    levels = levels_of(q.scheme).to(q.codes.device)
    # A grid's own codes may be anything of one byte: the index of each is that of its level.
    table = torch.zeros(256, dtype=torch.uint8, device=q.codes.device)
    own = q.rounding.encode(levels, q.scheme).view(torch.uint8).to(torch.int64)
    table[own] = torch.arange(len(levels), dtype=torch.uint8, device=q.codes.device)
    rows, width = q.codes.shape
    suffix, dtype, size = _stored(rows, width, len(levels))
    held = torch.empty(size, dtype=dtype, device=q.codes.device)
    step = part_of_rows(width)
    for start in range(0, rows, step):
        index = table[q.codes[start : start + step].view(torch.uint8).to(torch.int64)]
        held[start : start + step] = _packed(index, len(levels))
    return {
        suffix: held,
        LEVELS: levels.clone(),
        SCALE: q.scale.contiguous(),
        SHAPE: torch.tensor(q.codes.shape, dtype=torch.int64),
    }


def _packed(index: Tensor, levels: int) -> Tensor:
    """Indices uint8 [rows, width] as they are stored."""
    if levels == 3:
        return in_bytes(index, 3, TRITS_IN_BYTE)
    bits = bits_of(levels)
    return pack_codes((index.to(torch.int16) - (1 << (bits - 1))).to(torch.int8), bits)


def in_bytes(index: Tensor, base: int, count: int) -> Tensor:
    """`count` indices below `base` in each byte, the first the lowest digit: uint8 [..., n] → [..., ceil(n/count)]."""
    digits = pad(index, (0, -index.shape[-1] % count)).view(*index.shape[:-1], -1, count)
    powers = torch.tensor([base**k for k in range(count)], dtype=torch.uint8, device=index.device)
    return (digits * powers).sum(-1, dtype=torch.uint8)


def digits_of(base: int, count: int) -> Tensor:
    """The digits of every byte, uint8 [256, count], the lowest first."""
    return torch.stack([torch.arange(256) // base**k % base for k in range(count)], 1).to(torch.uint8)


def indices(stored: Tensor, levels: int, width: int) -> Tensor:
    """The index of each weight's level, uint8 [rows, width]. Raises Unclear for what stands for no level."""
    if levels == 3:
        if stored.numel() and int(stored.max()) >= 3**TRITS_IN_BYTE:
            raise Unclear(f"a byte is {int(stored.max())}, and five codes of three levels are below {3**TRITS_IN_BYTE}")
        table = digits_of(3, TRITS_IN_BYTE).to(stored.device)
        return table[stored.to(torch.int64)].flatten(1)[:, :width]
    index = of_bits(stored, bits_of(levels), width)
    if index.numel() and int(index.max()) >= levels:
        raise Unclear(f"a code is {int(index.max())}, and there are {levels} levels")
    return index


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """See `Format.unpack`; shapes are as `spec` says."""
    levels = levels_of(scheme).to(tensors[LEVELS].device)
    if not torch.equal(tensors[LEVELS], levels):
        raise LlmqError(f"{LEVELS} of a {scheme} weight are {tensors[LEVELS].tolist()}, not {levels.tolist()}")
    suffix = TRITS if len(levels) == 3 else CODES
    try:
        index = indices(tensors[suffix], len(levels), int(tensors[SHAPE][1]))
    except Unclear as unclear:
        raise LlmqError(f"{suffix} of a {scheme} weight: {unclear}") from unclear
    codes = rounding_of(scheme.rules).encode(levels, scheme)[index.to(torch.int64)]
    return QuantizedWeight(codes, tensors[SCALE], None, scheme)


def splits(width: int, scheme: Scheme, parts: int) -> bool:
    """Whether each part of a row has whole words, or bytes, and whole groups."""
    levels, part = len(levels_of(scheme)), width // parts
    whole = part % TRITS_IN_BYTE == 0 if levels == 3 else part * bits_of(levels) % 32 == 0
    return whole and (scheme.group_size is None or part % scheme.group_size == 0)


def nbytes(rows: int, width: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of a weight on llmq's kernels; dtype: of scales."""
    levels, groups = len(levels_of(scheme)), scheme.groups(width)
    if levels > 3:
        return -(-rows * width // 2) + 4 * rows * groups + 4 * 16
    count = TRITS_IN_BYTE if levels == 3 else BITS_IN_BYTE
    return rows * groups * (-(-width // groups // count) + dtype.itemsize) + 4 * 256 * count


@dataclass(frozen=True)
class FixedLayer:
    """The stored tensors of one weight; see `plain.Layer`. levels: how many; group: inputs that share a scale."""

    shape: tuple[int, int]
    levels: int
    group: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        suffix, dtype, size = _stored(*self.shape, self.levels)
        return {
            suffix: Entry((dtype,), size),
            LEVELS: Entry((torch.float32,), (self.levels,)),
            SCALE: Entry(FLOATS, (self.shape[0], self.shape[1] // self.group)),
            SHAPE: Entry((torch.int64,), (2,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> CodebookWeight | VectorsWeight:
        said = tuple(int(n) for n in tensors[SHAPE].tolist())
        if said != self.shape:
            raise LlmqError(f"{SHAPE} says {[*said]}, the model needs {[*self.shape]}")
        suffix = _stored(*self.shape, self.levels)[0]
        try:
            return (_pairs if self.levels > 3 else _vectors)(self, tensors[suffix], tensors[LEVELS], tensors[SCALE])
        except Unclear as unclear:
            raise LlmqError(f"{suffix}: {unclear}") from unclear


def _pairs(layer: FixedLayer, stored: Tensor, levels: Tensor, scale: Tensor) -> CodebookWeight:
    """Codes of 4 bits as NF4's operator reads them: blocks of the flattened weight."""
    rows, width = layer.shape
    packed = torch.empty(rows, width // 2, dtype=torch.uint8, device=stored.device)
    step = part_of_rows(width)
    for start in range(0, rows, step):
        index = indices(stored[start : start + step], layer.levels, width)
        packed[start : start + step] = index[:, 0::2] << 4 | index[:, 1::2]
    absmax, table = scale.to(torch.float32).reshape(-1), pad(levels, (0, 16 - len(levels)))
    return CodebookWeight(packed.view(-1), absmax, table, None, None, 0.0, rows, width, layer.group)


def _vectors(layer: FixedLayer, stored: Tensor, levels: Tensor, scale: Tensor) -> VectorsWeight:
    """Five codes of three levels, or eight of two, in a byte that begins anew in each group."""
    rows, width = layer.shape
    base, groups = layer.levels, width // layer.group
    count = TRITS_IN_BYTE if base == 3 else BITS_IN_BYTE
    packed = torch.empty(1, groups, -(-layer.group // count), rows, dtype=torch.uint8, device=stored.device)
    step = part_of_rows(width)
    for start in range(0, rows, step):
        index = indices(stored[start : start + step], base, width).view(-1, groups, layer.group)
        packed[0, :, :, start : start + step] = in_bytes(index, base, count).permute(1, 2, 0)
    table = levels[digits_of(base, count).to(levels.device, torch.int64)].unsqueeze(0)
    return VectorsWeight(packed, table, scale.t().contiguous(), width)


@dataclass(frozen=True)
class Fixed:
    """A stored weight with levels of a grid. codes, levels, scale: the names of its tensors; group: 0 for one scale."""

    source: Source
    codes: str
    levels: str
    scale: str
    shape: tuple[int, int]
    count: int
    group: int

    @property
    def bits(self) -> int:
        """Of an index of a level."""
        return bits_of(self.count)

    @property
    def holds(self) -> str:
        """What the codes are, if that is less than their bits hold."""
        if self.count == 1 << self.bits:
            return ""
        stored = 8 / TRITS_IN_BYTE if self.count == 3 else self.bits
        return f"{self.count} levels, {math.log2(self.count):.3g} bits of information, stored in {stored:g}"

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, dequantized in float32 and rounded to `dtype`. Raises Unclear for codes of no level."""
        index = indices(self.source.read_rows(self.codes, start, stop), self.count, self.shape[1])
        scale = self.source.read_rows(self.scale, start, stop).to(torch.float32)
        value = self.source.read(self.levels)[index.to(torch.int64)].view(len(index), scale.shape[1], -1)
        return value.mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)


def found(source: Source, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> Fixed:
    """A stored weight. Raises Unclear if its tensors do not fit each other."""
    levels, scale, (rows, width) = parts[LEVELS], parts[SCALE], shape
    count = levels.shape[0] if len(levels.shape) == 1 else 0
    codes = parts.get(TRITS if count == 3 else CODES)
    whole = 2 <= count <= 16 and levels.dtype == torch.float32 and scale.dtype in FLOATS and len(scale.shape) == 2
    groups = scale.shape[-1] if whole else 0
    whole = whole and groups > 0 and width % groups == 0 and scale.shape == (rows, groups) and codes is not None
    if not whole or codes is None or (codes.dtype, codes.shape) != _stored(rows, width, count)[1:]:
        told = {suffix: [*info.shape] for suffix, info in parts.items()}
        raise Unclear(f"{', '.join(f'{suffix} {size}' for suffix, size in told.items())} for [{rows}, {width}]")
    group = 0 if groups == 1 else width // groups
    return Fixed(source, codes.name, levels.name, scale.name, shape, count, group)
