"""A packed weight as one value: what everything below the torch operators takes.

The operators' schemas are flat tensors and numbers, because schemas must be; their implementations make one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.checks import check

# Beyond this many inputs an int32 sum of products of two numbers down to −128 might overflow.
LONGEST = (1 << 31) // (128 * 128) - 1


@dataclass(frozen=True)
class PackedInt:
    """Integer codes [out, in] of 2, 3, 4 or 8 bits with a scale, and perhaps a zero point, for each group of a row.

    packed, scale, zero: as the layout holds them (`layouts`), on one device. What they stand for:
    (code − zero) · scale.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    out_features: int
    in_features: int
    group_size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale and zero."""
        return self.packed, self.scale, self.zero


@dataclass(frozen=True)
class PackedCodebook:
    """4-bit codes [out, in] into a codebook of 16 numbers, as bitsandbytes 0.50 stores NF4 and FP4.

    packed: uint8 [ceil(out·in/2)], the first of two codes in the high half, along the flattened weight; codebook:
    float32 [16]; absmax: what each block_size of the flattened weight is multiplied by, float32 [blocks], or uint8
    [blocks] with nested_absmax float32 [ceil(blocks/256)] and nested_codebook float32 [256], and then it is
    nested_codebook[absmax] · nested_absmax + offset.
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
        """Raises TypeError or ValueError unless the tensors are as said: kernels would read past their end."""
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
class PackedInt8:
    """8-bit codes with a scale a row, for inputs that are rounded to 8 bits too.

    packed: int8 [out, in]; scale: float [out, 1]; input_scale: float [1], or None where each token has its own.
    """

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

    def check_sums(self) -> None:
        """Raises ValueError where int32 sums might overflow: from 131072 inputs on."""
        if self.in_features > LONGEST:
            raise ValueError(f"int32 sums hold the products of up to {LONGEST} inputs, not {self.in_features}")
