"""The plain form of a weight, to which every format's reader converts it before it is packed for a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.packing import pack_codes, unpack_codes

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BITS = (2, 3, 4, 8)
CHUNK = 1 << 22


@dataclass(frozen=True)
class IntWeight:
    """W [out, in] = (code − zero) · scale, in groups along the inputs after these are permuted by `order`.

    words: int32 [out, ceil(in·bits/32)], the dense little-endian stream of code + 2^(bits−1); scale: float [out,
    groups]; zero: int8 in the shape of scale, in the range of the codes, or None; bits: 2, 3, 4 or 8; the last group
    may be shorter; order: int32 [in], column i of W multiplies input order[i], or None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    in_features: int
    group_size: int
    order: Tensor | None = None


@dataclass(frozen=True)
class CodebookWeight:
    """W = codebook[code] · absmax of its block, with 4-bit codes: the weights that bitsandbytes stores.

    packed: uint8 [ceil(out·in/2)], the first code in the high four bits; absmax: float32 [blocks], or uint8 with
    nested_absmax float32 [ceil(blocks/256)] and nested_codebook float32 [256]; codebook: float32 [16].
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: float
    out_features: int
    in_features: int
    block_size: int


@dataclass(frozen=True)
class Int8Weight:
    """W = codes int8 [out, in] · scale float [out, 1]; the input is rounded per token, or with input_scale [1]."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None


@dataclass(frozen=True)
class Float8Weight:
    """W = codes float8_e4m3fn [out, in], without NaN, · scale float [out, 1]; the input is rounded to float8, too, per
    token or with input_scale [1]."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None


@dataclass(frozen=True)
class LevelsWeight:
    """W = levels[row, code], with codes of 2 to 4 bits: a codebook for each row.

    words: int32 [out, ceil(in·bits/32)], the dense little-endian stream of codes; levels: float [out, 2^bits].
    """

    words: Tensor
    levels: Tensor
    bits: int
    in_features: int

    def packed(self) -> tuple[Tensor, Tensor]:
        """Two codes in a byte, the first in the low half, uint8 [out, ceil(in/2)]; float32 levels [out, 16]."""
        rows, half = len(self.words), 1 << (self.bits - 1)
        packed = torch.empty(rows, -(-self.in_features // 2), dtype=torch.uint8, device=self.words.device)
        step = part_of_rows(self.in_features)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            codes = (unpack_codes(self.words[part], self.bits, self.in_features) + half).view(torch.uint8)
            codes = nn.functional.pad(codes, (0, self.in_features % 2))
            packed[part] = codes[:, 0::2] | codes[:, 1::2] << 4
        levels = self.levels.to(torch.float32)
        return packed, nn.functional.pad(levels, (0, 16 - levels.shape[1]))


@dataclass(frozen=True)
class VectorsWeight:
    """W = scale of the group · Σ over books of table[book, byte]: each byte selects a vector of n weights.

    packed: uint8 [books, groups, ceil(group_size/n), out]; table: float32 [books, 256, n]; scale: float [groups, out].
    """

    packed: Tensor
    table: Tensor
    scale: Tensor
    in_features: int

    @staticmethod
    def nbytes(rows: int, width: int, books: tuple[int, int, int], dtype: torch.dtype) -> int:
        """Bytes of a weight with one group to a row. books: codebooks, entries, n; dtype: of scales."""
        count, entries, size = books
        return rows * (width // size) * count + 4 * count * entries * size + rows * dtype.itemsize


Weight = IntWeight | CodebookWeight | Int8Weight | Float8Weight | LevelsWeight | VectorsWeight


@dataclass(frozen=True)
class Entry:
    """The dtypes and shape that a stored tensor must have."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)} {[*self.shape]}"


class Layer(Protocol):
    """The storage of one weight: the tensors that it must have, by suffix, and how to read them."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Suffix → the required tensor."""

    def read(self, tensors: Mapping[str, Tensor]) -> Weight:
        """The weight, on the tensors' device. Raises LlmqError if the values contradict each other."""


class Reader(Protocol):
    """Reads one checkpoint's format; constructed from its configuration."""

    suffixes: tuple[str, ...]

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> Layer | None:
        """The storage of the weight [out, in] of a linear module, or None if it is an ordinary tensor.

        name: of the module in the model; stored: its tensors in the files, by suffix. Raises LlmqError if the
        configuration and the files contradict each other.
        """


Configuration = Any


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    """A value of quantization_config as a mapping, empty for null. Raises LlmqError if it is anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise LlmqError(f"config.json: {key} must be an object, not {value!r:.60}")
    return value or {}


def part_of_rows(width: int) -> int:
    """How many rows of `width` values to work on at a time."""
    return max(1, CHUNK // max(width, 1))


def in_groups(words: Tensor, bits: int, width: int, group: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Reorder columns so that each group is contiguous; with activation order they are stored in another order.

    words: int32 [out, ceil(width·bits/32)]; group: integer [width], the group of each column; size: of a group. Returns
    the words with contiguous groups, and the order, None if they were contiguous already. Raises LlmqError if a group
    does not have `size` columns.
    """
    group = group.to(torch.int64)
    wanted = torch.arange(width, device=group.device) // size
    if torch.equal(group, wanted):
        return words, None
    order = torch.argsort(group, stable=True)
    if not torch.equal(group[order], wanted):
        found = torch.bincount(group.clamp(min=0), minlength=int(wanted[-1]) + 1).tolist()
        raise LlmqError(
            f"g_idx must give every group {size} of the {width} inputs, but the groups have {found[:8]}"
            f"{' …' if len(found) > 8 else ''}{', and some are negative' if int(group.min()) < 0 else ''}"
        )
    moved = torch.empty_like(words)
    step = part_of_rows(width)
    for start in range(0, words.shape[0], step):
        part = slice(start, start + step)
        moved[part] = pack_codes(unpack_codes(words[part], bits, width).index_select(1, order), bits)
    return moved, order.to(torch.int32)


def served(words: Tensor, bits: int, width: int) -> tuple[Tensor, int]:
    """Words of 5, 6 and 7 bits, which have no kernels, converted to 8 bits; other words unchanged."""
    if bits in BITS:
        return words, bits
    wide = torch.empty(words.shape[0], -(-width // 4), dtype=torch.int32, device=words.device)
    step = part_of_rows(width)
    for start in range(0, words.shape[0], step):
        part = slice(start, start + step)
        wide[part] = pack_codes(unpack_codes(words[part], bits, width), 8)
    return wide, 8


def none_if_zero(zero: Tensor) -> Tensor | None:
    """None if all zero points are 0, as in symmetric weights: kernels then need not read them."""
    return zero if bool(zero.any()) else None
