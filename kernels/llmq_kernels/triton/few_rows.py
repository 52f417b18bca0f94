"""One to some tens of rows on tensor cores, with K divided among the warps of a program, and among programs if needed.

Yᵀ = W · Xᵀ: the weight is the left operand, which tensor cores read from registers. Packed words are copied to shared
memory (asynchronous 16-byte copies, several tiles ahead), loaded directly in the operand's register layout, and
dequantized there. A slice of 32 codes along K is one dot, so no data is joined or reshaped.

The dot is a batch of WARPS_K dots, one for each warp: warp p of a program processes tiles p, p + WARPS_K, … of the same
rows, and the partial sums are added at the end, within the program. So a weight of 4096 rows keeps a GPU busy in a
single launch, without partial sums in memory. PROGRAMS_K > 1 divides K among programs too; `sums` then adds their
results in a fixed order.

With `routes`, a program's rows are those of one expert of stacked weights (`routes`).

Sums are float32; codes are exact; a group's sum is multiplied by its scale, so there is one rounding in all. Scales are
loaded one step before they are used: they are too narrow for asynchronous copies, and Triton does not pipeline a loop
that carries a value over more than one step. With more than four groups per tile there are no registers for that.
"""

import triton
import triton.language as tl

from llmq_kernels.triton.arithmetic import follow, product, rounded
from llmq_kernels.triton.routes import of_expert, route
from llmq_kernels.triton.unpack import (
    half_codes,
    load_words,
    one_group,
    per_group,
    position,
    slice_words,
    slices,
    spread_tables,
    table_codes,
    words,
)


@triton.jit(do_not_specialize=["M", "tiles", "groups", "experts", "choices"])
def few_rows_kernel(
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
    WARPS_K: tl.constexpr,
    PROGRAMS_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [M, N], or with PROGRAMS_K > 1 its float32 parts [PROGRAMS_K, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]; tables: int32 [8, N] with PER_ROW, else
    [8], a codebook of 4-bit codes, or None. RUN: slices that always share a group.
    EVEN_K: all tiles are full, and WARPS_K divides their number.
    routes: None, or what `route` reads; packed, scale, zero, tables and bias are then those of all experts, stacked.
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
    section = tl.program_id(2)
    warp = tl.arange(0, WARPS_K)
    t = tl.arange(0, 32)
    row = n < N
    row_2d = row[None, :]
    n_2d = n[None, :]
    w_at = packed + n.to(tl.int64)[None, :, None] * (tiles * WORDS) + warp[:, None, None] * WORDS + t[None, None, :]
    x_at = x + x_row.to(tl.int64)[None, None, :] * K + warp[:, None, None] * (SLICES * 32) + t[None, :, None]
    column = used[None, None, :]
    steps = tl.cdiv(tiles, WARPS_K)
    begin = steps * section // PROGRAMS_K * WARPS_K
    end = steps * (section + 1) // PROGRAMS_K * WARPS_K
    if routes is not None:
        end = tl.where(some, end, begin)
    total = tl.zeros([WARPS_K, BLOCK_N, BLOCK_M], dtype=tl.float32)
    AHEAD: tl.constexpr = SLICES // RUN <= 4
    if AHEAD:
        tile = (begin + warp)[:, None]
        s_run = per_group(scale, tile, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
        z_run = per_group(zero, tile, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
    for first in range(begin, end, WARPS_K):
        tile = (first + warp)[:, None]
        if AHEAD:
            s_next = per_group(scale, tile + WARPS_K, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
            z_next = per_group(zero, tile + WARPS_K, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
        if EVEN_K:
            w_mask = row[None, :, None]
        else:
            w_mask = row[None, :, None] & (first + warp < tiles)[:, None, None]
        tile_words = load_words(w_at + first * WORDS, w_mask, BITS)
        if tables is not None:
            t8 = spread_tables(tables, n_2d, row_2d, N, PER_ROW, [WARPS_K, BLOCK_N, 32])
            values = table_codes(tile_words[0], t8, DTYPE, BACKEND)
        run = tl.zeros([WARPS_K, BLOCK_N, BLOCK_M], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            if EVEN_K:
                x_mask = column
            else:
                inside = ((first + warp) * (SLICES * 32))[:, None] + j * 32 + t[None, :] < K
                x_mask = column & inside[:, :, None]
            xs = tl.load(x_at + (first * (SLICES * 32) + j * 32), mask=x_mask, other=0.0)
            if tables is not None:
                codes = values[j]
            else:
                w = slice_words(tile_words, BITS, j, BACKEND)
            if zero is None:
                z = None
            else:
                if AHEAD:
                    z = z_run[j // RUN]
                else:
                    z = one_group(zero, tile, j, n_2d, row_2d, N, groups, GROUP, SLICES)
                z = tl.broadcast_to(z.to(tl.float32)[:, :, None], [WARPS_K, BLOCK_N, 32])
            if tables is None:
                codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, BACKEND)
            run = product(codes, xs, run, BACKEND)
            if (j + 1) % RUN == 0:
                if AHEAD:
                    s = s_run[j // RUN]
                else:
                    s = one_group(scale, tile, j, n_2d, row_2d, N, groups, GROUP, SLICES)
                total += run * s.to(tl.float32)[:, :, None]
                if j + 1 < SLICES:
                    run = tl.zeros([WARPS_K, BLOCK_N, BLOCK_M], dtype=tl.float32)
        if AHEAD:
            s_run = s_next
            z_run = z_next
    out = tl.sum(total, axis=0)
    if PROGRAMS_K == 1 and bias is not None:
        if routes is None:
            out += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
        else:
            out += tl.load(bias + n, mask=n < tl.where(some, N, 0), other=0.0).to(tl.float32)[:, None]
    y_at = y + (section * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_at, rounded(out, y.dtype.element_ty, BACKEND), mask=row[:, None] & used[None, :])
