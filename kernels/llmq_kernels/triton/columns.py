"""Columns of a weight rounded one after the other, each compensated in those behind it: GPTQ's inner loop as a kernel.

torch launches about eight kernels a column, each of some microseconds, whatever it computes. Here a program has some
rows of all columns of a block in registers, and rounds them to whole numbers as `llmq.numerics` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.arithmetic import whole
from llmq_kernels.triton.launch import Launch, launch

COLUMNS = 128
"""The most columns of a call: one warp has 64 registers for them."""
ROWS = 16


@triton.jit
def columns_kernel(
    block, coefficients, scale, zero, steps, points, changes, columns, rows, coefficients_stride, scale_stride,
    zero_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block [columns, rows] per program, column by column.

    Without steps, the block is of weights: points p gets their nearest points on the grid of scale and zero, and
    changes what is left, w − (p − zero) · scale. With steps, it is of gradients g: points are moved to those nearest to
    p + g · step, and changes gets that times scale. A column's change times its coefficients is subtracted from those
    behind it.

    coefficients: [columns, columns]; scale, steps, points, changes: [columns, rows]; zero: the same or None; strides:
    from a column to the next. All float32.
    """
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    at = column[:, None].to(tl.int64) * rows + row[None, :]
    left = tl.load(block + at, mask=(column < columns)[:, None] & there[None, :], other=0.0)
    for k in range(columns):
        mine = tl.sum(tl.where(column[:, None] == k, left, 0.0), 0)
        here = tl.cast(k, tl.int64) * rows + row
        size = tl.load(scale + tl.cast(k, tl.int64) * scale_stride + row, mask=there, other=1.0)
        if steps is None:
            wanted = tl.div_rn(mine, size)
            point = nearest(wanted)
            lift = tl.zeros_like(point)
            if zero is not None:
                lift = tl.load(zero + tl.cast(k, tl.int64) * zero_stride + row, mask=there, other=0.0)
            point = tl.minimum(tl.maximum(point + lift, LOW), HIGH)
            change = mine - (point - lift) * size
        else:
            before = tl.load(points + here, mask=there, other=0.0)
            wanted = mine * tl.load(steps + here, mask=there, other=0.0) + before
            point = tl.minimum(tl.maximum(nearest(wanted), LOW), HIGH)
            change = (point - before) * size
        tl.store(points + here, point, mask=there)
        tl.store(changes + here, change, mask=there)
        behind = (column > k) & (column < columns)
        weight = tl.load(coefficients + tl.cast(k, tl.int64) * coefficients_stride + column, mask=behind, other=0.0)
        left -= weight[:, None] * change[None, :]


@triton.jit
def nearest(value):
    """The nearest whole number; far outside of any grid, some other one there."""
    return whole(tl.minimum(tl.maximum(value, -1048576.0), 1048576.0))


def round_columns(
    block: Tensor, coefficients: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Round columns of weights, and compensate each in those behind it.

    block: float32 [columns, out], at most COLUMNS; it is not changed; coefficients: float32 [columns, columns]; scale,
    zero: float32 [columns, out]; low, high: the grid's whole numbers. Each last axis is contiguous, the block wholly.
    Returns the points and what is left of the weights, [columns, out].
    """
    points, changes = torch.empty_like(block), torch.empty_like(block)
    launch(block.device, build(block, coefficients, scale, zero, None, points, changes, low, high))
    return points, changes


def recode_columns(
    gradient: Tensor, coefficients: Tensor, scale: Tensor, steps: Tensor, points: Tensor, low: int, high: int
) -> Tensor:
    """Move points, in place, to those nearest to where each column's gradient leads, which follows the moves before.

    gradient: float32 [columns, out], at most COLUMNS; it is not changed; steps, points: the same; the others as in
    `round_columns`. Returns what the moves do to the weights, [columns, out].
    """
    changes = torch.empty_like(gradient)
    launch(gradient.device, build(gradient, coefficients, scale, None, steps, points, changes, low, high))
    return changes


def build(
    block: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    steps: Tensor | None,
    points: Tensor,
    changes: Tensor,
    low: int,
    high: int,
) -> Launch:
    """The launch that fills points and changes."""
    columns, rows = block.shape
    contiguous = [one for one in (block, steps, points, changes) if one is not None]
    if not 0 < columns <= COLUMNS or not all(one.is_contiguous() for one in contiguous):
        raise ValueError(f"columns are at most {COLUMNS}, in contiguous tensors; not {columns}")
    given = [one for one in (coefficients, scale, zero) if one is not None]
    if any(one.stride(-1) != 1 and one.shape[-1] > 1 for one in given):
        raise ValueError("coefficients, scales and zero points of a column must be contiguous")
    strides = (one.stride(0) if one is not None else 0 for one in (coefficients, scale, zero))
    arguments = (block, coefficients, scale, zero, steps, points, changes, columns, rows, *strides)
    constexprs = {"LOW": float(low), "HIGH": float(high), "COLUMNS": COLUMNS, "ROWS": ROWS}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return Launch(columns_kernel, (triton.cdiv(rows, ROWS),), arguments, constexprs, options)
