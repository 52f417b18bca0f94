"""Weights of 4-bit codes into codebooks, in the layout "planes": the kernels of integers look codes up instead.

NF4 and FP4 have one codebook for all rows and a magnitude for every block, levels of rows one for each row and no
magnitude. A code is unpacked with its tile as integers are, and becomes a value by byte permutations
(`triton/unpack.py`); its scale multiplies the sum of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.backend import triton_refusal
from llmq_kernels.int_linear import planes
from llmq_kernels.nf4_linear.reference import nf4_absmax
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels


def refusal(device: torch.device, dtype: torch.dtype, in_features: int, block_size: int) -> str | None:
    """Why the Triton kernels do not support such a weight, or None. block_size: of values that share a magnitude."""
    if in_features % block_size:
        return f"blocks of {block_size} do not divide rows of {in_features}"
    return planes.refusal(device, dtype, 4, 1, in_features, block_size)


def usable(device: torch.device, dtype: torch.dtype, in_features: int, block_size: int) -> bool:
    """Whether to pack for a device: on a GPU that the kernels support; never for Triton's interpreter on a CPU."""
    if device.type in ("cpu", "meta") or triton_refusal(device) is not None:
        return False
    return refusal(device, dtype, in_features, block_size) is None


def of_blocks(weight: PackedCodebook) -> PackedInt:
    """A weight as bitsandbytes stores it, of blocks that divide its rows."""
    out, width = weight.out_features, weight.in_features
    absmax = nf4_absmax(weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.offset)

    def codes() -> Iterator[tuple[slice, Tensor]]:
        for rows in products.row_slabs(out, width, planes.SLAB, 2):
            some = weight.packed[rows.start * width // 2 : -(-rows.stop * width // 2)]
            both = torch.stack((some >> 4, some & 15), 1).view(-1)
            yield rows, both[: (rows.stop - rows.start) * width].view(-1, width)

    return pack(codes(), absmax.view(out, -1), weight.codebook.view(1, 16), width)


def of_levels(weight: PackedLevels) -> PackedInt:
    """A weight with a codebook for each row."""
    out, width = weight.out_features, weight.in_features

    def codes() -> Iterator[tuple[slice, Tensor]]:
        for rows in products.row_slabs(out, width, planes.SLAB):
            some = weight.packed[rows]
            yield rows, torch.stack((some & 15, some >> 4), 2).flatten(1)[:, :width]

    ones = torch.ones(out, 1, dtype=torch.float32, device=weight.packed.device)
    return pack(codes(), ones, weight.levels, width)


def pack(codes: Iterable[tuple[slice, Tensor]], scale: Tensor, codebook: Tensor, width: int) -> PackedInt:
    """4-bit codes of a codebook → the layout's form, on the same device.

    codes: slices of rows and their codes, uint8 [rows, in] of 0 … 15, in turn; scale: float [out, groups], groups of
    equal length along the row; codebook: float32 [1, 16] or [out, 16].
    """
    out, groups = scale.shape
    tiles = -(-width // planes.TILE[4])
    packed = torch.empty(out, tiles * planes.WORDS[4], dtype=torch.int16, device=scale.device)
    for rows, part in codes:
        whole = torch.nn.functional.pad(part.to(torch.int32), (0, tiles * planes.TILE[4] - width))
        packed[rows] = planes.interleave(whole.view(len(whole), tiles, -1, 32), 4).view(len(whole), -1)
    codebook = codebook.to(torch.float32).contiguous()
    group_size, tables = -(-width // groups), tables_of(codebook)
    return PackedInt(packed, scale.t().contiguous(), None, 4, out, width, group_size, codebook, tables)


def nbytes(out_features: int, in_features: int, group_size: int, *, own: bool) -> int:
    """Bytes of what `pack` returns: codes, float32 scales, the codebook and its tables. own: one for each row."""
    books = (out_features if own else 1) * 16 * (4 + len(planes.HALF) * 2)
    return planes.nbytes(torch.float32, 4, out_features, in_features, group_size, False) + books


def tables_of(codebook: Tensor) -> Tensor:
    """A codebook [rows, 16] as kernels look it up: int32 [2, 8, rows], in bfloat16 and in float16.

    Four registers hold the low bytes of 16 entries, four the high bytes, the first entry lowest.
    """
    found = []
    for dtype in planes.HALF:
        entries = codebook.to(dtype).contiguous().view(torch.uint8).view(len(codebook), 4, 4, 2)
        found.append(entries.permute(3, 1, 0, 2).contiguous().view(torch.int32).view(8, len(codebook)))
    return torch.stack(found)
