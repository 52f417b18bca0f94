"""Tens to hundreds of rows: a fused product on tensor cores, split along K where the weight is too small for the GPU.

Yᵀ = W · Xᵀ: the weight is the left operand, the one that tensor cores take from registers, so codes go from shared
memory into registers in the operand's own arrangement, packed, and become numbers there. A tile is one [rows, 32] dot
for each slice: codes are unpacked by slices, and x is read by slices, so nothing is joined or reshaped.

Sums are float32. Scales multiply the sum of a group (exact codes, one rounding in all), or with PRESCALE the codes:
cheaper from about half a group's length of x rows, and W is then rounded to 16 bits as the operator says.
"""

import triton
import triton.language as tl

from llmq_kernels.triton.unpack import half_codes, plane, position, sixteenth, slices, words


@triton.jit
def gemm_kernel(
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
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRESCALE: tl.constexpr,
    ASM: tl.constexpr,
):
    """y [M, N], or with SPLIT > 1 its float32 parts [SPLIT, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]. GROUP 0: one group. RUN: slices that
    certainly share a group, 0 where all do.
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
    first = tiles * part // SPLIT
    last = tiles * (part + 1) // SPLIT
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for tile in range(first, last):
        w0 = tl.load(w_at + tile * WORDS, mask=row[:, None], other=0)
        if BITS == 3:
            w1 = tl.load(w_at + tile * WORDS + 32, mask=row[:, None], other=0)
            w2 = tl.load(w_at + tile * WORDS + 64, mask=row[:, None], other=0)
        if RUN > 0:
            run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            k = tile * (SLICES * 32) + j * 32
            if EVEN_K:
                xs = tl.load(x_at + k, mask=column, other=0.0)
            else:
                xs = tl.load(x_at + k, mask=column & (k + t < K)[:, None], other=0.0)
            if plane(BITS, j) == 0:
                w = w0
            elif plane(BITS, j) == 1:
                w = w1
            elif plane(BITS, j) == 2:
                w = w2
            else:
                w = sixteenth(w0, w1, w2, ASM)
            if GROUP > 0:
                group = tl.minimum(k // GROUP, groups - 1)
            else:
                group = 0
            if zero is not None:
                z = tl.load(zero + group * N + n, mask=row, other=0).to(tl.float32)
                z = tl.broadcast_to(z[:, None], [BLOCK_N, 32])
            else:
                z = None
            codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, ASM)
            if PRESCALE:
                s = tl.load(scale + group * N + n, mask=row, other=0.0)
                codes = codes * s[:, None]
                total = tl.dot(codes, xs, total)
            elif RUN == 0:
                total = tl.dot(codes, xs, total)
            else:
                run = tl.dot(codes, xs, run)
                if (j + 1) % RUN == 0:
                    s = tl.load(scale + group * N + n, mask=row, other=0.0).to(tl.float32)
                    total += run * s[:, None]
                    if j + 1 < SLICES:
                        run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if RUN == 0 and not PRESCALE:
        total *= tl.load(scale + n, mask=row, other=0.0).to(tl.float32)[:, None]
    y_at = y + (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT == 1:
        if bias is not None:
            total += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row[:, None] & column)
