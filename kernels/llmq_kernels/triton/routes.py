"""Which expert multiplies which rows, for kernels on stacked weights: without a word from the host, which knows only
how many rows there are.

Sorted rows: programs take blocks of rows of one expert each. How many blocks there are depends on the routing, but not
by much, so there are always as many as there can be (`most`), and a table, made on the device, says what each does.
Pairs of a token and an expert need no table: each is a block of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.arithmetic import follow
from llmq_kernels.triton.config import power
from llmq_kernels.triton.launch import Launch

# Blocks whose entries one program of `blocks_kernel` writes; entries are padded to a multiple.
ENTRIES = 8


@triton.jit(do_not_specialize=["S", "experts"])
def blocks_kernel(
    offs,
    blocks,
    S,
    experts,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PDL: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """blocks int32 [ENTRIES · programs, 3]: of every block its expert, its first row, and where its expert's rows end.

    offs: int32 [experts]; rows of S beyond the last offset count as those of one expert more. Blocks that are not
    needed have no rows. EXPERTS: a power of two above `experts`.
    """
    follow(PDL)
    e = tl.arange(0, EXPERTS)
    end = tl.minimum(tl.maximum(tl.load(offs + e, mask=e < experts, other=S), 0), S)
    start = tl.load(offs + e - 1, mask=(e > 0) & (e <= experts), other=0)
    start = tl.where(e <= experts, tl.minimum(tl.maximum(start, 0), S), S)
    count = tl.where(end > start, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    after = tl.cumsum(count, 0)
    before = after - count
    b = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mine = (before[None, :] <= b[:, None]) & (b[:, None] < after[None, :])
    row = start[None, :] + (b[:, None] - before[None, :]) * BLOCK_M
    tl.store(blocks + b * 3, tl.sum(tl.where(mine, e[None, :], 0), 1))
    tl.store(blocks + b * 3 + 1, tl.sum(tl.where(mine, row, 0), 1))
    tl.store(blocks + b * 3 + 2, tl.sum(tl.where(mine, end[None, :], 0), 1))


@triton.jit
def route(routes, experts, choices, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """Of the block program_id(1): its expert, whether it has one and rows, its rows of x and of y, and which are used.

    routes: the table of `blocks_kernel`; or with PAIRS the expert of every pair, `choices` for each row of x, in order.
    Who has no expert of 0 … experts − 1 gets zeros.
    """
    block = tl.program_id(1)
    at = tl.arange(0, BLOCK_M)
    if PAIRS:
        expert = tl.load(routes + block).to(tl.int32)
        some = (expert >= 0) & (expert < experts)
        x_row = block // choices + at
        y_row = block + at
        used = at < 1
    else:
        expert = tl.load(routes + block * 3)
        first = tl.load(routes + block * 3 + 1)
        end = tl.load(routes + block * 3 + 2)
        some = (first < end) & (expert < experts)
        x_row = first + at
        y_row = x_row
        used = y_row < end
    return tl.where(some, expert, 0), some, x_row, y_row, used


@triton.jit
def of_expert(values, expert, N, each):
    """Where the values of one of the stacked experts begin, `each` for each of its N rows; None if there are none."""
    if values is None:
        found = None
    else:
        found = values + expert.to(tl.int64) * N * each
    return found


def most(rows: int, experts: int, block_m: int) -> int:
    """Blocks of rows of one expert each, at most: the last of each expert, and of none, may have a single row."""
    return (rows + min(rows, experts + 1) * (block_m - 1)) // block_m


def build(offs: Tensor, blocks: Tensor, rows: int, block_m: int, pdl: bool, backend: str) -> Launch:
    """The launch that fills blocks int32 [entries, 3], `most` rounded up to ENTRIES. pdl: see Config."""
    experts = offs.shape[0]
    constexprs = {
        "BLOCK_M": block_m,
        "EXPERTS": power(experts + 1, 2),
        "ENTRIES": ENTRIES,
        "PDL": pdl,
        "BACKEND": backend,
    }
    options = {"num_warps": 4, "enable_fp_fusion": True} | ({"launch_pdl": True} if pdl else {})
    return Launch(blocks_kernel, (blocks.shape[0] // ENTRIES,), (offs, blocks, rows, experts), constexprs, options)
