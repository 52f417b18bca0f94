"""Weights of 16-entry codebooks as integers of 8 bits, for a CPU: another weight, chosen only by request.

torch has no product with a codebook; its 8-bit operator multiplies integers as fast as memory delivers them. An entry
becomes a whole number of steps, of which the largest is 64 to 127; the length of a step is the one, of those, at which
the entries are off least. It takes twice the memory. NF4 weights that were normally distributed are off by .5 % (root
mean square).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llmq_kernels.nf4_linear.reference import nf4_absmax
from llmq_kernels.products import row_slabs
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels

LARGEST = 127
TRIED = 1000
SLAB = 1 << 20


def of_blocks(weight: PackedCodebook) -> PackedInt:
    """A weight as bitsandbytes stores it, of blocks that divide its rows, in the plain form of 8 bits.

    Raises ValueError if blocks do not divide rows, or rows have an odd number of inputs.
    """
    out, width, block = weight.out_features, weight.in_features, weight.block_size
    if width % block or width % 2:
        raise ValueError(f"blocks of {block} do not divide rows of {width}, or 2 does not")
    steps, length = whole_steps(weight.codebook.view(1, 16))
    absmax = nf4_absmax(weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.offset)

    def codes() -> Iterator[tuple[slice, Tensor]]:
        for rows in row_slabs(out, width, SLAB):
            some = weight.packed[rows.start * width // 2 : rows.stop * width // 2].view(-1, width // 2)
            both = torch.stack((some >> 4, some & 15), 2).flatten(1)
            yield rows, steps[0][both.to(torch.int32)]

    return _plain(codes(), absmax.view(out, -1) * length, width, block)


def of_levels(weight: PackedLevels) -> PackedInt:
    """A weight with a codebook for each row, in the plain form of 8 bits."""
    out, width = weight.out_features, weight.in_features
    steps, length = whole_steps(weight.levels)

    def codes() -> Iterator[tuple[slice, Tensor]]:
        for rows in row_slabs(out, width, SLAB):
            some = weight.packed[rows]
            both = torch.stack((some & 15, some >> 4), 2).flatten(1)[:, :width]
            yield rows, steps[rows].gather(1, both.to(torch.int64))

    return _plain(codes(), length, width, width)


def whole_steps(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks [rows, 16] → each entry as a number of steps, int8 [rows, 16], and a step's length, float32 [rows, 1].

    The length is the one, of those that make the largest entry 64 to 127 steps, with the least sum of squared errors.
    """
    codebook = codebook.to(torch.float32)
    peak = codebook.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    shares = codebook / peak
    best = torch.full_like(peak, torch.inf)
    largest = torch.full_like(peak, LARGEST)
    for tried in torch.linspace(64, LARGEST, TRIED).tolist():
        off = ((shares * tried).round() / tried - shares).square().sum(1, keepdim=True)
        better = off < best
        best, largest = torch.where(better, off, best), torch.where(better, tried, largest)
    return (shares * largest).round().to(torch.int8), peak / largest


def _plain(codes: Iterable[tuple[slice, Tensor]], scale: Tensor, width: int, group_size: int) -> PackedInt:
    """The plain form of int8 codes and their scales [out, groups], float32."""
    words = torch.zeros(len(scale), -(-width // 4) * 4, dtype=torch.uint8, device=scale.device)
    for rows, part in codes:
        words[rows, :width] = part.view(torch.uint8) ^ 128
    return PackedInt(words.view(torch.int32), scale, None, 8, len(scale), width, group_size)
