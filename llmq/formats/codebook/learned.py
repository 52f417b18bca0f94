"""Levels of each row: `weight_codes`, a dense stream of bits as compressed-tensors packs integers, and `weight_levels`
[out, 2^bits] in the model's dtype. Where n rows share levels, these are [ceil(out / n), 2^bits], `weight_scale`
[out, 1] multiplies them, and `weight_shape` has n as a third number. Kernels have levels of each row in any case.
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

CODES, LEVELS, SCALE, SHAPE = "weight_codes", "weight_levels", "weight_scale", "weight_shape"
SUFFIXES = (CODES, LEVELS, SHAPE)


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    check_range("mse", scheme, width)
    shared = scheme.level_rows > 1
    return {
        CODES: (torch.int32, (rows, packed_width(width, scheme.bits))),
        LEVELS: (scale_dtype, (-(-rows // scheme.level_rows), 1 << scheme.bits)),
        **({SCALE: (scale_dtype, (rows, 1))} if shared else {}),
        SHAPE: (torch.int64, (3 if shared else 2,)),
    }


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    if q.levels is None:
        raise LlmqError(f"a {q.scheme} weight needs the levels of its rows: return it by `Rounding.finish`")
    rows = q.scheme.level_rows
    return {
        CODES: pack_codes(q.codes.to(torch.int8) - (1 << (q.scheme.bits - 1)), q.scheme.bits),
        LEVELS: q.levels[::rows].to(q.scale.dtype).contiguous(),
        **({SCALE: q.scale.contiguous()} if rows > 1 else {}),
        SHAPE: torch.tensor([*q.codes.shape, *([rows] if rows > 1 else [])], dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """See `Format.unpack`; shapes are as `spec` says."""
    levels = tensors[LEVELS]
    rows, width = (int(n) for n in tensors[SHAPE][:2].tolist())
    codes = indices(tensors[CODES], scheme.bits, width)
    if scheme.level_rows == 1:
        scale = torch.ones(rows, 1, dtype=levels.dtype, device=levels.device)
        return QuantizedWeight(codes, scale, None, scheme, levels=levels.to(torch.float32))
    told = [int(n) for n in tensors[SHAPE][2:]]
    if told != [scheme.level_rows]:
        raise LlmqError(f"{SHAPE} of a {scheme} weight says that {told} rows share levels")
    each = levels.to(torch.float32).repeat_interleave(scheme.level_rows, 0)[:rows].contiguous()
    return QuantizedWeight(codes, tensors[SCALE], None, scheme, levels=each)


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
    """The stored tensors of one weight; see `plain.Layer`. together: rows that share levels."""

    shape: tuple[int, int]
    bits: int
    together: int = 1

    @property
    def entries(self) -> Mapping[str, Entry]:
        (rows, width), shared = self.shape, self.together > 1
        return {
            CODES: Entry((torch.int32,), (rows, packed_width(width, self.bits))),
            LEVELS: Entry(FLOATS, (-(-rows // self.together), 1 << self.bits)),
            **({SCALE: Entry(FLOATS, (rows, 1))} if shared else {}),
            SHAPE: Entry((torch.int64,), (3 if shared else 2,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> LevelsWeight:
        said = tuple(int(n) for n in tensors[SHAPE].tolist())
        wanted = (*self.shape, self.together) if self.together > 1 else self.shape
        if said != wanted:
            raise LlmqError(f"{SHAPE} says {[*said]}, the model and config.json {[*wanted]}")
        levels = tensors[LEVELS]
        if self.together > 1:
            each = levels.to(torch.float32).repeat_interleave(self.together, 0)[: self.shape[0]]
            levels = each * tensors[SCALE].to(torch.float32)
        return LevelsWeight(tensors[CODES], levels, self.bits, self.shape[1])


@dataclass(frozen=True)
class Learned:
    """A stored weight. codes, levels, scale: the names of its tensors; together: how many rows share levels."""

    source: Source
    codes: str
    levels: str
    shape: tuple[int, int]
    bits: int
    together: int = 1
    scale: str = ""
    group: int = 0

    @property
    def holds(self) -> str:
        """How many rows share levels, if they do."""
        return f"levels of {self.together} rows" if self.together > 1 else ""

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, dequantized in float32 and rounded to `dtype`."""
        codes = indices(self.source.read_rows(self.codes, start, stop), self.bits, self.shape[1])
        first, last = start // self.together, -(-stop // self.together)
        levels = self.source.read_rows(self.levels, first, last).to(torch.float32)
        if self.together == 1:
            return levels.gather(1, codes.to(torch.int64)).to(dtype)
        each = levels.repeat_interleave(self.together, 0)[start - first * self.together :][: stop - start]
        scale = self.source.read_rows(self.scale, start, stop).to(torch.float32)
        return each.gather(1, codes.to(torch.int64)).mul_(scale).to(dtype)


def found(source: Source, parts: Mapping[str, TensorInfo], shape: tuple[int, int], together: int = 1) -> Learned:
    """A stored weight, of which so many rows share levels. Raises Unclear if its tensors do not fit each other."""
    codes, levels, scale = parts[CODES], parts[LEVELS], parts.get(SCALE)
    rows, width = shape
    bits = levels.shape[1].bit_length() - 1
    tables = -(-rows // together) if together > 0 else 0
    whole = codes.dtype == torch.int32 and levels.dtype in FLOATS and levels.shape == (tables, 1 << bits)
    if scale is not None:
        whole = whole and together > 1 and scale.dtype in FLOATS and scale.shape == (rows, 1)
    if not whole or (together > 1 and scale is None) or codes.shape != (rows, packed_width(width, bits)):
        raise Unclear(f"codes {[*codes.shape]} with levels {[*levels.shape]} for [{rows}, {width}]")
    return Learned(source, codes.name, levels.name, shape, bits, together, "" if scale is None else scale.name)
