"""One to some tens of rows on tensor cores, with K divided among the warps of a program, and programs if need be.

Yᵀ = W · Xᵀ: the weight is the left operand, which tensor cores take from registers: packed words go through shared
memory (asynchronous 16-byte copies, several tiles ahead) straight into the operand's own arrangement, and become
numbers there. A slice of 32 codes along K is one dot, so nothing is joined or reshaped.

The dot is a batch of PARTS dots, one for each warp: warp p of a program takes tiles p, p + PARTS, … of the same rows,
and the parts are added once at the end, in the program. So a weight of 4096 rows keeps a GPU busy in a single launch,
with no partial sums in memory. SPLIT > 1 divides K among programs too; `reduce_kernel` then adds, always in one order.

Sums are float32; codes are exact; a group's sum is multiplied by its scale, so there is one rounding in all. Scales are
fetched one step before they are needed: they are too narrow for asynchronous copies, and Triton pipelines no loop that
carries a value further than one step. Not so those of more than four groups a tile, for which there are no registers.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.configs import TILE, WORDS, Config, Variant, choices, run_length
from llmq_kernels.triton.unpack import dot, half_codes, one_group, per_group, plane, position, sixteenth, slices, words


@triton.jit(do_not_specialize=["M", "tiles", "groups"])
def splitk_kernel(
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
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    MODE: tl.constexpr,
):
    """y [M, N], or with SPLIT > 1 its float32 parts [SPLIT, M, N].

    x: [M, K]; packed: int16 [N, tiles · words]; scale, zero: [groups, N]. RUN: slices that certainly
    share a group. EVEN_K: tiles are full, and PARTS divides them.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    SLICES: tl.constexpr = slices(BITS)
    WORDS: tl.constexpr = words(BITS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    section = tl.program_id(2)
    part = tl.arange(0, PARTS)
    t = tl.arange(0, 32)
    row = n < N
    row_2d = row[None, :]
    n_2d = n[None, :]
    w_at = packed + n.to(tl.int64)[None, :, None] * (tiles * WORDS) + part[:, None, None] * WORDS + t[None, None, :]
    x_at = x + m.to(tl.int64)[None, None, :] * K + part[:, None, None] * (SLICES * 32) + t[None, :, None]
    column = (m < M)[None, None, :]
    steps = tl.cdiv(tiles, PARTS)
    begin = steps * section // SPLIT * PARTS
    end = steps * (section + 1) // SPLIT * PARTS
    total = tl.zeros([PARTS, BLOCK_N, BLOCK_M], dtype=tl.float32)
    AHEAD: tl.constexpr = SLICES // RUN <= 4
    if AHEAD:
        tile = (begin + part)[:, None]
        s_run = per_group(scale, tile, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
        z_run = per_group(zero, tile, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
    for first in range(begin, end, PARTS):
        tile = (first + part)[:, None]
        if AHEAD:
            s_next = per_group(scale, tile + PARTS, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
            z_next = per_group(zero, tile + PARTS, n_2d, row_2d, N, groups, GROUP, SLICES, RUN)
        if EVEN_K:
            w_mask = row[None, :, None]
        else:
            w_mask = row[None, :, None] & (first + part < tiles)[:, None, None]
        w0 = tl.load(w_at + first * WORDS, mask=w_mask, other=0)
        if BITS == 3:
            w1 = tl.load(w_at + first * WORDS + 32, mask=w_mask, other=0)
            w2 = tl.load(w_at + first * WORDS + 64, mask=w_mask, other=0)
        run = tl.zeros([PARTS, BLOCK_N, BLOCK_M], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            if EVEN_K:
                x_mask = column
            else:
                inside = ((first + part) * (SLICES * 32))[:, None] + j * 32 + t[None, :] < K
                x_mask = column & inside[:, :, None]
            xs = tl.load(x_at + (first * (SLICES * 32) + j * 32), mask=x_mask, other=0.0)
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
                if AHEAD:
                    z = z_run[j // RUN]
                else:
                    z = one_group(zero, tile, j, n_2d, row_2d, N, groups, GROUP, SLICES)
                z = tl.broadcast_to(z.to(tl.float32)[:, :, None], [PARTS, BLOCK_N, 32])
            codes = half_codes(w, z, BITS, position(BITS, j), DTYPE, MODE)
            run = dot(codes, xs, run, MODE)
            if (j + 1) % RUN == 0:
                if AHEAD:
                    s = s_run[j // RUN]
                else:
                    s = one_group(scale, tile, j, n_2d, row_2d, N, groups, GROUP, SLICES)
                total += run * s.to(tl.float32)[:, :, None]
                if j + 1 < SLICES:
                    run = tl.zeros([PARTS, BLOCK_N, BLOCK_M], dtype=tl.float32)
        if AHEAD:
            s_run = s_next
            z_run = z_next
    out = tl.sum(total, axis=0)
    if SPLIT == 1 and bias is not None:
        out += tl.load(bias + n, mask=row, other=0.0).to(tl.float32)[:, None]
    y_at = y + (section * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_at, out.to(y.dtype.element_ty), mask=row[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(parts, bias, y, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] = Σ parts [SPLIT, M, N] + bias, in float32, rounded once."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * M + m) * N + n, mask=n < N, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)


def reduce(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y [M, N] filled with the sum of parts [SPLIT, M, N]."""
    split, m, n = parts.shape
    reduce_kernel[(triton.cdiv(n, 512), m)](parts, bias, y, m, n, SPLIT=split, BLOCK=512, num_warps=4)
    return y


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
    splitk_kernel[grid](
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
        PARTS=config.parts,
        SPLIT=config.split,
        EVEN_K=k == tiles * TILE[bits] and tiles % config.parts == 0,
        MODE=mode,
        **config.options(mode),
    )
    return y if config.split == 1 else reduce(out, bias, y)


def variants() -> Iterator[Variant]:
    """Everything that the rule reaches, on the GPUs it reaches it on, and the reduction."""
    for choice in choices("splitk"):
        tiles, rest = divmod(choice.in_features, TILE[choice.bits])
        even = rest == 0 and tiles % choice.config.parts == 0
        constexprs = {"PARTS": choice.config.parts, "SPLIT": choice.config.split, "EVEN_K": even}
        yield choice.variant(splitk_kernel, constexprs, parts=choice.config.split > 1)
    for split in (2, 4, 8):
        signature = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "M": "i32", "N": "i32"}
        constexprs = {"SPLIT": split, "BLOCK": 512}
        yield Variant(f"reduce {split}", reduce_kernel, signature, constexprs, 4, 1, ("parts", "bias", "y", "N"))
