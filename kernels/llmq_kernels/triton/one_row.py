"""One to four rows: no tensor cores, one pass over the weight, no second kernel.

A program processes a few rows of the weight over all of K, with its threads along K: each loads 16 bytes of each row at
a time, and uses its values of x, in float32, for all rows. Codes become float32 by a mask, an exponent and one fused
multiply-add (`unpack.single_codes`); a second one multiplies by x and adds; a thread's sum over a group is scaled once.
Zero points use the sum of x: Σ (q − z)·x = Σ q·x − z·Σ x. With `routes`, as `few_rows`.
"""

import triton
import triton.language as tl

from llmq_kernels.triton.arithmetic import follow, rounded
from llmq_kernels.triton.routes import of_expert, route
from llmq_kernels.triton.unpack import (
    load_words,
    position,
    single_codes,
    slice_words,
    slices,
    spread_tables,
    table_codes,
    words,
)


@triton.jit(do_not_specialize=["M", "tiles", "groups", "experts", "choices"])
def one_row_kernel(
    x,
    packed,
    scale,
    zero,
    tables,
    bias,
    routes,
    y,
    M,
    N,
    K,
    tiles,
    groups,
    experts,
    choices,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [M, N], M ≤ BLOCK_M; with routes, any M.

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]; tables, routes: as in `few_rows`.
    """
    follow(PDL)
    SLICES: tl.constexpr = slices(BITS)
    WORDS: tl.constexpr = words(BITS)
    LANES: tl.constexpr = TILES * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if routes is None:
        m = tl.arange(0, BLOCK_M)
        x_row = m
        used = m < M
        last = tiles
    else:
        expert, some, x_row, m, used = route(routes, experts, choices, BLOCK_M, PAIRS)
        packed = of_expert(packed, expert, N, tiles * WORDS)
        scale = of_expert(scale, expert, N, groups)
        zero = of_expert(zero, expert, N, groups)
        tables = of_expert(tables, expert, N if PER_ROW else 1, 16)
        bias = of_expert(bias, expert, N, 1)
        last = tl.where(some, tiles, 0)
    at = tl.arange(0, TILES * 32)
    lane_tile = tl.arange(0, LANES) // 4
    row = n < N
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS) + (at // 32 * WORDS + at % 32)[None, :]
    x_at = x + x_row.to(tl.int64)[:, None, None] * K + (at // 32 * (SLICES * 32) + at % 32)[None, None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N, LANES], dtype=tl.float32)
    for first in range(0, last, TILES):
        w_mask = row[:, None] & (first + at // 32 < tiles)[None, :]
        tile_words = load_words(w_at + first * WORDS, w_mask, BITS)
        run = tl.zeros([BLOCK_M, BLOCK_N, TILES * 32], dtype=tl.float32)
        if tables is not None:
            t8 = spread_tables(tables, n, row, N, PER_ROW, [BLOCK_N, TILES * 32])
            values = table_codes(tile_words[0], t8, x.dtype.element_ty, BACKEND)
        if zero is not None:
            sums = tl.zeros([BLOCK_M, 1, TILES * 32], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            offset = first * (SLICES * 32) + j * 32
            x_mask = used[:, None, None] & (offset + at // 32 * (SLICES * 32) + at % 32 < K)[None, None, :]
            xs = tl.load(x_at + offset, mask=x_mask, other=0.0).to(tl.float32)
            if tables is not None:
                codes = values[j].to(tl.float32)
            else:
                codes = single_codes(slice_words(tile_words, BITS, j, BACKEND), BITS, position(BITS, j), BACKEND)
            run += codes[None, :, :] * xs
            if zero is not None:
                sums += xs
            if (j + 1) % RUN == 0:
                group = tl.minimum(((first + lane_tile) * SLICES + j) * 32 // GROUP, groups - 1)
                s = tl.load(scale + group[None, :] * N + n[:, None], mask=row[:, None], other=0.0).to(tl.float32)
                part = tl.sum(tl.reshape(run, [BLOCK_M, BLOCK_N, LANES, 8]), axis=3)
                if zero is not None:
                    z = tl.load(zero + group[None, :] * N + n[:, None], mask=row[:, None], other=0).to(tl.float32)
                    part -= z[None, :, :] * tl.sum(tl.reshape(sums, [BLOCK_M, 1, LANES, 8]), axis=3)
                    sums = tl.zeros([BLOCK_M, 1, TILES * 32], dtype=tl.float32)
                total += s[None, :, :] * part
                run = tl.zeros([BLOCK_M, BLOCK_N, TILES * 32], dtype=tl.float32)
    out = tl.sum(total, axis=2)
    if bias is not None:
        if routes is None:
            out += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[None, :]
        else:
            out += tl.load(bias + n, mask=n < tl.where(some, N, 0), other=0.0).to(tl.float32)[None, :]
    y_at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, rounded(out, y.dtype.element_ty, BACKEND), mask=used[:, None] & row[None, :])
