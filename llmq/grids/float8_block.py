"""Weights in float8_e4m3fn with one scale for each block of 128 output channels and 128 inputs: w ≈ code · scale.

Liu et al. 2024, arXiv:2412.19437, section 3.3.2 (fine-grained quantization). Everywhere in llmq a scale is that of one
channel's group; here those of a block are equal, and only one of them is stored. Once found they are fixed, as no
solver that improves the scale of a single channel could keep them equal: `stored_scale` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import check_range
from llmq.grids.float8 import Float8, find_float8_scale
from llmq.grids.scheme import Scheme


class Float8Block(Float8):
    """See `Rounding`. `stored_scale` of a weight has the scale of every block, [blocks of channels, groups]."""

    apart = False

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: the best for all weights of a block together."""
        width = weight.shape[1]
        check_range(method, scheme, width)
        groups = scheme.groups(width)
        by = None if importance is None else importance.view(groups, 1, -1)
        found = []
        for band in _bands(weight, scheme):
            # A block is searched as if it were a channel.
            blocks = band.reshape(len(band), groups, -1).transpose(0, 1)
            mine = None if by is None else by.expand_as(blocks).flatten(1)
            found.append(find_float8_scale(blocks.flatten(1), method, scale_dtype, mine).t())
        return spread(torch.cat(found), len(weight), scheme), None

    def settle(self, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `Rounding.settle`: of scales that differ within a block the largest, at which nothing is clipped anew."""
        stored = torch.cat([band.amax(0, keepdim=True) for band in _bands(scale, scheme)])
        return spread(stored, len(scale), scheme), zero, stored


def _bands(value: Tensor, scheme: Scheme) -> list[Tensor]:
    """The rows of a matrix, in parts that share scales."""
    step = scheme.rules.rows
    return [value[start : start + step] for start in range(0, len(value), step)]


def spread(stored: Tensor, rows: int, scheme: Scheme) -> Tensor:
    """The scales of all channels [rows, groups], of those of blocks."""
    return stored.repeat_interleave(scheme.rules.rows, 0)[:rows].contiguous()
