"""Tens to hundreds of rows: a fused product on tensor cores, split among programs where a weight is small for the GPU.

Yᵀ = W · Xᵀ, as in `splitk`, but one dot of [rows, 32] at a time, which on Hopper is a warp-group's, with the weight in
registers. Scales are loaded where they are used: carried from one step to the next, they keep Triton from unpacking
codes in the operand's own arrangement, and dequantized codes then go through shared memory (seen in its TTGIR).

Sums are float32. Scales multiply the sum of a group (exact codes, one rounding in all), or with PRESCALE the codes,
which costs less and needs half the accumulators where groups are short and rows of x many; W is then rounded to x's
dtype, as the operator says.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.configs import TILE, WORDS, Config, Variant, choices, run_length
from llmq_kernels.triton.splitk import reduce
from llmq_kernels.triton.unpack import dot, half_codes, per_group, plane, position, scaled, sixteenth, slices, words


@triton.jit(do_not_specialize=["M", "tiles", "groups"])
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
    MODE: tl.constexpr,
):
    """y [M, N], or with SPLIT > 1 its float32 parts [SPLIT, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]. RUN: slices that certainly
    share a group.
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
        s_run = per_group(scale, tile, n, row, N, groups, GROUP, SLICES, RUN)
        z_run = per_group(zero, tile, n, row, N, groups, GROUP, SLICES, RUN)
        w0 = tl.load(w_at + tile * WORDS, mask=row[:, None], other=0)
        if BITS == 3:
            w1 = tl.load(w_at + tile * WORDS + 32, mask=row[:, None], other=0)
            w2 = tl.load(w_at + tile * WORDS + 64, mask=row[:, None], other=0)
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
                w = sixteenth(w0, w1, w2, MODE)
            if zero is None:
                z = None
            else:
                z = tl.broadcast_to(z_run[j // RUN].to(tl.float32)[:, None], [BLOCK_N, 32])
            codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, MODE)
            if PRESCALE:
                s = tl.broadcast_to(s_run[j // RUN].to(DTYPE)[:, None], [BLOCK_N, 32])
                total = dot(scaled(codes, s, MODE), xs, total, MODE)
            else:
                run = dot(codes, xs, run, MODE)
                if (j + 1) % RUN == 0:
                    total += run * s_run[j // RUN].to(tl.float32)[:, None]
                    if j + 1 < SLICES:
                        run = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    y_at = y + (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT == 1:
        if bias is not None:
            total += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row[:, None] & column)


def launch(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: Config,
    mode: str,
) -> Tensor:
    """x [M, K] contiguous → [M, N] in x's dtype."""
    (m, k), n, groups = x.shape, packed.shape[0], scale.shape[0]
    tiles = packed.shape[1] // WORDS[bits]
    group, run = run_length(bits, group_size, k)
    y = x.new_empty(m, n)
    out = y if config.split == 1 else x.new_empty(config.split, m, n, dtype=torch.float32)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split)
    gemm_kernel[grid](
        x,
        packed,
        scale,
        zero,
        bias,
        out,
        m,
        n,
        k,
        tiles,
        groups,
        BITS=bits,
        GROUP=group,
        RUN=run,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT=config.split,
        EVEN_K=k == tiles * TILE[bits],
        PRESCALE=config.prescale and scale.dtype == x.dtype,
        MODE=mode,
        **config.options(mode),
    )
    return y if config.split == 1 else reduce(out, bias, y)


def variants() -> Iterator[Variant]:
    """Everything that the rule reaches, on the GPUs it reaches it on."""
    for choice in choices("gemm"):
        even = choice.in_features % TILE[choice.bits] == 0
        constexprs = {"SPLIT": choice.config.split, "EVEN_K": even, "PRESCALE": choice.config.prescale}
        yield choice.variant(gemm_kernel, constexprs, parts=choice.config.split > 1)
