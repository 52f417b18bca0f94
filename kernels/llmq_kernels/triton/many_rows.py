"""Tens to hundreds of rows: a fused product on tensor cores, with K split among programs if the weight is small.

Yᵀ = W · Xᵀ, as in `few_rows`, but slices of a tile are put side by side to one dot of up to 128 inputs. On Hopper that
is one group of warp-group instructions with the weight in registers, and one wait for it: a dot for each slice would
wait four times a tile. Scales of sums are loaded one tile ahead; zero points, and scales of codes, in their own tile:
if they were carried from one to the next, Triton would not unpack codes in the operand's layout, and dequantized codes
would go through shared memory (seen in its TTGIR).

Sums are float32. Scales multiply the sum of a group (exact codes, one rounding in all) or, with PRESCALE, the codes:
then small groups need no dots of their own; W is rounded to x's dtype, as the operator's definition allows.

The sum of a tile is always multiplied before it is added to the total, with PRESCALE by a one that the compiler does
not see: where a dot's result is its own next input, triton 3.6 lets Hopper's products overlap the next tile's unpacking
and overwrites their operands (triton issue 9433; scripts/compile_kernels.py looks for it in the machine code).
"""

import triton
import triton.language as tl

from llmq_kernels.triton.arithmetic import follow, product, rounded, scaled
from llmq_kernels.triton.routes import of_expert, route
from llmq_kernels.triton.unpack import (
    half_codes,
    load_words,
    per_group,
    position,
    side_by_side,
    slice_words,
    slices,
    spread_tables,
    table_codes,
    words,
)


@triton.jit(do_not_specialize=["M", "tiles", "groups", "experts", "choices"])
def many_rows_kernel(
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
    PROGRAMS_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRESCALE: tl.constexpr,
    DOT: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [M, N], or with PROGRAMS_K > 1 its float32 parts [PROGRAMS_K, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]; tables, routes: as in `few_rows`. RUN: slices
    that always share a group; DOT: slices of a dot, which without PRESCALE share one.
    """
    follow(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    SLICES: tl.constexpr = slices(BITS)
    WORDS: tl.constexpr = words(BITS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if routes is None:
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        x_row = m
        used = m < M
    else:
        expert, some, x_row, m, used = route(routes, experts, choices, BLOCK_M, PAIRS)
        packed = of_expert(packed, expert, N, tiles * WORDS)
        scale = of_expert(scale, expert, N, groups)
        zero = of_expert(zero, expert, N, groups)
        tables = of_expert(tables, expert, N if PER_ROW else 1, 16)
        bias = of_expert(bias, expert, N, 1)
    part = tl.program_id(2)
    k_dot = tl.arange(0, DOT * 32)
    t = tl.arange(0, 32)
    row = n < N
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS) + t[None, :]
    x_at = x + x_row.to(tl.int64)[None, :] * K + k_dot[:, None]
    column = used[None, :]
    first = tiles * part // PROGRAMS_K
    last = tiles * (part + 1) // PROGRAMS_K
    if routes is not None:
        last = tl.where(some, last, first)
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if PRESCALE:
        one = tl.where(M > 0, 1.0, 0.0)
    else:
        s_run = per_group(scale, first, n, row, N, groups, GROUP, SLICES, RUN)
    for tile in range(first, last):
        if PRESCALE:
            s_run = per_group(scale, tile, n, row, N, groups, GROUP, SLICES, RUN)
        else:
            s_next = per_group(scale, tile + 1, n, row, N, groups, GROUP, SLICES, RUN)
        z_run = per_group(zero, tile, n, row, N, groups, GROUP, SLICES, RUN)
        tile_words = load_words(w_at + tile * WORDS, row[:, None], BITS)
        if tables is not None:
            t8 = spread_tables(tables, n, row, N, PER_ROW, [BLOCK_N, 32])
            values = table_codes(tile_words[0], t8, DTYPE, BACKEND)
        for d in tl.static_range(SLICES // DOT):
            k = (tile * SLICES + d * DOT) * 32
            if EVEN_K:
                xs = tl.load(x_at + k, mask=column, other=0.0)
            else:
                xs = tl.load(x_at + k, mask=column & (k + k_dot < K)[:, None], other=0.0)
            parts = ()
            for j in tl.static_range(d * DOT, d * DOT + DOT):
                if zero is None:
                    z = None
                else:
                    z = tl.broadcast_to(z_run[j // RUN].to(tl.float32)[:, None], [BLOCK_N, 32])
                if tables is not None:
                    codes = values[j]
                else:
                    w = slice_words(tile_words, BITS, j, BACKEND)
                    codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, BACKEND)
                if PRESCALE:
                    s = tl.broadcast_to(s_run[j // RUN].to(DTYPE)[:, None], [BLOCK_N, 32])
                    codes = scaled(codes, s, BACKEND)
                parts = parts + (codes,)  # type: ignore[assignment]
            run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            run = product(side_by_side(parts, DOT), xs, run, BACKEND)
            if PRESCALE:
                total += run * one
            else:
                total += run * s_run[d * DOT // RUN].to(tl.float32)[:, None]
        if not PRESCALE:
            s_run = s_next
    y_at = y + (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if PROGRAMS_K == 1:
        if bias is not None:
            if routes is None:
                total += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
            else:
                total += tl.load(bias + n, mask=n < tl.where(some, N, 0), other=0.0).to(tl.float32)[:, None]
    tl.store(y_at, rounded(total, y.dtype.element_ty, BACKEND), mask=row[:, None] & column)
