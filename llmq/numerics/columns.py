"""Column by column: later columns of a block are changed for what was done to earlier ones."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import first_line
from llmq.grids.base import Rounding
from llmq.grids.scheme import Scheme
from llmq_kernels.backend import triton_refusal

INNER = 32
"""Columns that are updated one by one; the others for this many at once, while the block passes the cache once."""


def compensate(block: Tensor, coefficients: Tensor, changes: Tensor, column: int) -> None:
    """Subtract cᵀδ of a column from those behind it in its part of a block; behind the part's last column, that of the
    whole part from all others of the block.

    block: [columns, out], changed in place; coefficients c: [columns, columns]; changes δ: [columns, out], known up to
    this column.
    """
    first = column // INNER * INNER
    stop = min(first + INNER, len(block))
    if column + 1 < stop:
        block[column + 1 : stop].addr_(coefficients[column, column + 1 : stop], changes[column], alpha=-1)
    elif stop < len(block):
        block[stop:].addmm_(coefficients[first:stop, stop:].t(), changes[first:stop], alpha=-1)


class Kernels(NamedTuple):
    """Kernels that round all columns of a block at once, at most `most`, to whole numbers from low to high."""

    module: ModuleType
    most: int
    low: int
    high: int

    def round(self, block: Tensor, coefficients: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """The points of a block of weights, and what is left of the weights; all [columns, out], float32."""
        found: tuple[Tensor, Tensor] = self.module.round_columns(block, coefficients, scale, zero, self.low, self.high)
        return found

    def move(self, gradient: Tensor, coefficients: Tensor, scale: Tensor, steps: Tensor, points: Tensor) -> Tensor:
        """Move points in place by a gradient; returns what that does to the weights; all [columns, out], float32."""
        found: Tensor = self.module.recode_columns(gradient, coefficients, scale, steps, points, self.low, self.high)
        return found


def kernels_for(rounding: Rounding, scheme: Scheme, device: torch.device) -> Kernels | None:
    """The kernels for a grid on a GPU, where torch would launch several for each column; None where there are none."""
    limits = rounding.whole(scheme)
    if limits is None or device.type != "cuda" or triton_refusal(device) is not None:
        return None
    from llmq_kernels.triton import columns

    return Kernels(columns, columns.COLUMNS, *limits) if works(columns, device) else None


@functools.cache
def works(module: ModuleType, device: torch.device) -> bool:
    """Whether the kernels compile and run on a device, which takes more than triton: a C compiler, for one."""
    one = torch.ones(1, 1, device=device)
    try:
        points, _ = module.round_columns(one, one, one, None, -8, 7)
        problem = "" if float(points) == 1 else "its results are wrong"
    except Exception as error:  # noqa: BLE001  (a compiler may raise anything)
        problem = first_line(error)
    if problem:
        warnings.warn(
            f"the kernel that rounds many columns at once does not run on {device} ({problem}): columns are rounded "
            "one by one, which gives as good weights and takes longer",
            stacklevel=2,
        )
    return not problem
