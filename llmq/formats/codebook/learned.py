"""Levels of each row: `weight_codes`, a dense stream of bits as compressed-tensors packs integers, and `weight_levels`
[out, 2^bits] in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Spec, Unclear
from llmq.formats.packing import pack_codes, packed_width, unpack_codes
from llmq.formats.plain import FLOATS, Entry, LevelsWeight
from llmq.grids.base import QuantizedWeight, check_range
from llmq.grids.scheme import Scheme

CODES, LEVELS, SHAPE = "weight_codes", "weight_levels", "weight_shape"
SUFFIXES = (CODES, LEVELS, SHAPE)


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    check_range("mse", scheme, width)
    return {
        CODES: (torch.int32, (rows, packed_width(width, scheme.bits))),
        LEVELS: (scale_dtype, (rows, 1 << scheme.bits)),
        SHAPE: (torch.int64, (2,)),
    }


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    if q.levels is None:
        raise LlmqError(f"a {q.scheme} weight needs the levels of its rows: return it by `Rounding.finish`")
    return {
        CODES: pack_codes(q.codes.to(torch.int8) - (1 << (q.scheme.bits - 1)), q.scheme.bits),
        LEVELS: q.levels.to(q.scale.dtype).contiguous(),
        SHAPE: torch.tensor(q.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """See `Format.unpack`; shapes are as `spec` says."""
    levels = tensors[LEVELS]
    rows, width = (int(n) for n in tensors[SHAPE].tolist())
    codes = indices(tensors[CODES], scheme.bits, width)
    scale = torch.ones(rows, 1, dtype=levels.dtype, device=levels.device)
    return QuantizedWeight(codes, scale, None, scheme, levels=levels.to(torch.float32))


def indices(words: Tensor, bits: int, width: int) -> Tensor:
    """The index of each weight's level, uint8 [rows, width], of a stream of bits."""
    return (unpack_codes(words, bits, width).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def splits(width: int, scheme: Scheme, parts: int) -> bool:
    """Whether each part of a row has whole words."""
    return width // parts * scheme.bits % 32 == 0


def nbytes(rows: int, width: int) -> int:
    """Bytes of a weight on llmq's kernels: two codes in a byte, and 16 levels in float32 for each row."""
    return rows * -(-width // 2) + rows * 16 * 4


@dataclass(frozen=True)
class LearnedLayer:
    """The stored tensors of one weight; see `plain.Layer`."""

    shape: tuple[int, int]
    bits: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        return {
            CODES: Entry((torch.int32,), (rows, packed_width(width, self.bits))),
            LEVELS: Entry(FLOATS, (rows, 1 << self.bits)),
            SHAPE: Entry((torch.int64,), (2,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> LevelsWeight:
        said = tuple(int(n) for n in tensors[SHAPE].tolist())
        if said != self.shape:
            raise LlmqError(f"{SHAPE} says {[*said]}, the model needs {[*self.shape]}")
        return LevelsWeight(tensors[CODES], tensors[LEVELS], self.bits, self.shape[1])


@dataclass(frozen=True)
class Learned:
    """A stored weight with levels of each row. codes, levels: the names of its tensors."""

    source: Source
    codes: str
    levels: str
    shape: tuple[int, int]
    bits: int
    group: int = 0
    holds: str = ""

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, dequantized in float32 and rounded to `dtype`."""
        codes = indices(self.source.read_rows(self.codes, start, stop), self.bits, self.shape[1])
        levels = self.source.read_rows(self.levels, start, stop).to(torch.float32)
        return levels.gather(1, codes.to(torch.int64)).to(dtype)


def found(source: Source, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> Learned:
    """A stored weight. Raises Unclear if its tensors do not fit each other."""
    codes, levels = parts[CODES], parts[LEVELS]
    rows, width = shape
    bits = levels.shape[1].bit_length() - 1
    whole = codes.dtype == torch.int32 and levels.dtype in FLOATS and levels.shape == (rows, 1 << bits)
    if not whole or codes.shape != (rows, packed_width(width, bits)):
        raise Unclear(f"codes {[*codes.shape]} with levels {[*levels.shape]} for [{rows}, {width}]")
    return Learned(source, codes.name, levels.name, shape, bits)
