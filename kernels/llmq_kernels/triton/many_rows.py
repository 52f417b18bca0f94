"""Tens to hundreds of rows: a fused product on tensor cores, with K split among programs if the weight is small.

Yᵀ = W · Xᵀ, as in `few_rows`, but one dot of [rows, 32] at a time, which on Hopper is a warp-group instruction with the
weight in registers. Scales are loaded when they are used: if they were carried from one step to the next, Triton would
not unpack codes in the operand's own layout, and dequantized codes would go through shared memory (seen in its TTGIR).

Sums are float32. Scales multiply the sum of a group (exact codes, one rounding in all) or, with PRESCALE, the codes,
which costs less and needs half the accumulators for small groups and many rows of x; W is then rounded to x's dtype, as
the operator's definition allows.
"""

import triton
import triton.language as tl

from llmq_kernels.triton.arithmetic import product, rounded, scaled
from llmq_kernels.triton.unpack import half_codes, load_words, per_group, position, slice_words, slices, words


@triton.jit(do_not_specialize=["M", "tiles", "groups"])
def many_rows_kernel(
    x,
    packed,
    scale,
    zero,
    bias,
    y,
    M,
    N,
    K,
    tiles,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRESCALE: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [M, N], or with PROGRAMS_K > 1 its float32 parts [PROGRAMS_K, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]. RUN: slices that always share a group.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    SLICES: tl.constexpr = slices(BITS)
    WORDS: tl.constexpr = words(BITS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    t = tl.arange(0, 32)
    row = n < N
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS) + t[None, :]
    x_at = x + m.to(tl.int64)[None, :] * K + t[:, None]
    column = (m < M)[None, :]
    first = tiles * part // PROGRAMS_K
    last = tiles * (part + 1) // PROGRAMS_K
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for tile in range(first, last):
        s_run = per_group(scale, tile, n, row, N, groups, GROUP, SLICES, RUN)
        z_run = per_group(zero, tile, n, row, N, groups, GROUP, SLICES, RUN)
        tile_words = load_words(w_at + tile * WORDS, row[:, None], BITS)
        run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            k = tile * (SLICES * 32) + j * 32
            if EVEN_K:
                xs = tl.load(x_at + k, mask=column, other=0.0)
            else:
                xs = tl.load(x_at + k, mask=column & (k + t < K)[:, None], other=0.0)
            w = slice_words(tile_words, BITS, j, BACKEND)
            if zero is None:
                z = None
            else:
                z = tl.broadcast_to(z_run[j // RUN].to(tl.float32)[:, None], [BLOCK_N, 32])
            codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, BACKEND)
            if PRESCALE:
                s = tl.broadcast_to(s_run[j // RUN].to(DTYPE)[:, None], [BLOCK_N, 32])
                total = product(scaled(codes, s, BACKEND), xs, total, BACKEND)
            else:
                run = product(codes, xs, run, BACKEND)
                if (j + 1) % RUN == 0:
                    total += run * s_run[j // RUN].to(tl.float32)[:, None]
                    if j + 1 < SLICES:
                        run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    y_at = y + (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if PROGRAMS_K == 1:
        if bias is not None:
            total += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
    tl.store(y_at, rounded(total, y.dtype.element_ty, BACKEND), mask=row[:, None] & column)
