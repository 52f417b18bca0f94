"""A packed weight as one value, the argument of all functions below the torch operators.

Operator schemas allow only tensors and numbers as separate arguments; the implementations combine them into these
classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.checks import FLOATS, check

# With more inputs than this, int32 sums of int8 products might overflow.
LONGEST = (1 << 31) // (128 * 128) - 1


@dataclass(frozen=True)
class PackedInt:
    """Integer codes [out, in] of 2, 3, 4 or 8 bits with a scale and optionally a zero point for each group of a row.

    packed, scale, zero: in the layout's form (`layouts`), on one device. The weight is (code − zero) · scale.

    codebook, tables: only in the layout "planes", of 4-bit codes that count the entries of a codebook: float32 [1, 16],
    or [out, 16] with one for each row, and the same as kernels read it (`codebooks.tables_of`). The weight is then
    codebook[code] · scale.

    Of stacked experts, every tensor has an axis more, the first, and the sizes are those of one expert.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    out_features: int
    in_features: int
    group_size: int
    codebook: Tensor | None = None
    tables: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale and zero."""
        return self.packed, self.scale, self.zero


@dataclass(frozen=True)
class PackedCodebook:
    """4-bit codes [out, in] of a codebook of 16 values, as bitsandbytes 0.50 stores NF4 and FP4.

    packed: uint8 [ceil(out·in/2)], the first of two codes in the high half, along the flattened weight; codebook:
    float32 [16]; absmax: the magnitude of each block of block_size values of the flattened weight, float32 [blocks]; or
    its code, uint8 [blocks], with nested_absmax float32 [ceil(blocks/256)] and nested_codebook float32 [256]: the
    magnitude is then nested_codebook[absmax] · nested_absmax + offset.
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

    def check(self) -> None:
        """Raises TypeError or ValueError unless dtypes and shapes fit; kernels would read past the end."""
        size = self.out_features * self.in_features
        blocks = -(-size // self.block_size)
        check("packed", self.packed, torch.uint8, (-(-size // 2),))
        check("codebook", self.codebook, torch.float32, (16,))
        if self.nested_absmax is None or self.nested_codebook is None:
            check("absmax", self.absmax, torch.float32, (blocks,))
            return
        check("absmax", self.absmax, torch.uint8, (blocks,))
        check("nested_absmax", self.nested_absmax, torch.float32, (-(-blocks // 256),))
        check("nested_codebook", self.nested_codebook, torch.float32, (256,))


@dataclass(frozen=True)
class PackedLevels:
    """4-bit codes [out, in] of a codebook for each row.

    packed: uint8 [out, ceil(in/2)], the first of two codes in the low half; levels: float32 [out, 16].
    """

    packed: Tensor
    levels: Tensor
    out_features: int
    in_features: int

    def check(self) -> None:
        """Raises TypeError or ValueError unless dtypes and shapes fit; kernels would read past the end."""
        check("packed", self.packed, torch.uint8, (self.out_features, -(-self.in_features // 2)))
        check("levels", self.levels, torch.float32, (self.out_features, 16))


@dataclass(frozen=True)
class PackedVectors:
    """Bytes that select vectors of n weights of a row, [out, in], with a scale for each group of a row.

    packed: uint8 [books, groups, ceil(group_size/n), out], the vectors of a group in order; table: float32 [books, 256,
    n]; scale: float [groups, out]. A weight is its scale times the sum of its entries of all books; what the last
    vector of a group has too many counts for nothing.
    """

    packed: Tensor
    table: Tensor
    scale: Tensor
    out_features: int
    in_features: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.scale.shape[0]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.groups

    def check(self) -> None:
        """Raises TypeError or ValueError unless dtypes and shapes fit; kernels would read past the end."""
        books, n = self.table.shape[0], self.table.shape[-1]
        check("table", self.table, torch.float32, (books, 256, n))
        check("scale", self.scale, FLOATS, (self.scale.shape[0], self.out_features))
        if self.groups < 1 or self.in_features % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.in_features} inputs")
        check("packed", self.packed, torch.uint8, (books, self.groups, -(-self.group_size // n), self.out_features))


@dataclass(frozen=True)
class _Codes:
    """Codes of rows with a scale each, whose inputs are rounded too: fields and sizes."""

    packed: Tensor
    scale: Tensor
    input_scale: Tensor | None

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.packed.shape[1]


@dataclass(frozen=True)
class PackedInt8(_Codes):
    """8-bit codes with one scale per row, for inputs that are rounded to 8 bits too.

    packed: int8 [out, in]; scale: float [out, 1]; input_scale: float [1], or None if each token has its own.
    """

    def check_sums(self) -> None:
        """Raises ValueError if int32 sums might overflow: from 131072 inputs on."""
        if self.in_features > LONGEST:
            raise ValueError(f"int32 sums hold the products of up to {LONGEST} inputs, not {self.in_features}")


@dataclass(frozen=True)
class PackedFloat8(_Codes):
    """Codes in float8_e4m3fn with one scale per row, for inputs that are rounded to float8 too.

    packed: float8_e4m3fn [out, in], without NaN; scale: float [out, 1]; input_scale: float [1], or None if each token
    has its own.
    """

    def check(self) -> None:
        """Raises TypeError or ValueError unless dtypes and shapes fit."""
        check("weight", self.packed, torch.float8_e4m3fn, tuple(self.packed.shape))
        check("scale", self.scale, FLOATS, (self.out_features, 1))
        if self.input_scale is not None:
            check("input_scale", self.input_scale, FLOATS, (1,))
