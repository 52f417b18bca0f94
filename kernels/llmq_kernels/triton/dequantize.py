"""Dequantize to a dense weight, for products with so many rows that the vendor's dense kernel is worth the copy.

It writes four times the bytes that it reads (4 bits to 16), so it is memory-bound however codes are unpacked: values
are computed in float32 and rounded once, exactly as in `reference.dequantize`.
"""

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.int_linear.planes import WORDS
from llmq_kernels.triton.arithmetic import rounded
from llmq_kernels.triton.config import run_length
from llmq_kernels.triton.launch import Launch
from llmq_kernels.triton.unpack import load_words, per_group, position, single_codes, slice_words, slices, words
from llmq_kernels.weights import PackedInt

ROWS = 16


@triton.jit(do_not_specialize=["tiles", "groups", "blocks"])
def dequantize_kernel(
    packed,
    scale,
    zero,
    codebook,
    offs,
    y,
    N,
    K,
    stride,
    tiles,
    groups,
    blocks,
    packed_stride,
    scale_stride,
    codebook_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [N, K] = (codes − zero) · scale, or codebook[codes] · scale, of float32 [N, 16] with PER_ROW, else [16].

    packed: int16 [N, tiles · words]; scale, zero: [groups, N], strided. Of stacked experts all this has an axis more,
    with these strides, `blocks` of BLOCK_N rows an expert; offs: None, or int32 where their rows of x end: those of
    experts that have none are left out.
    """
    SLICES: tl.constexpr = slices(BITS)
    WORDS_OF_TILE: tl.constexpr = words(BITS)
    # One axis: the others hold 65,535 programs, fewer than the stacked rows of many experts need.
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    n = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, 32)
    row = n < N
    expert = (block // blocks).to(tl.int64)
    if offs is not None:
        start = tl.where(expert > 0, tl.load(offs + tl.maximum(expert - 1, 0)), 0)
        row = n < tl.where(tl.load(offs + expert) > start, N, 0)
    packed += expert * packed_stride
    scale += expert * scale_stride
    if zero is not None:
        zero += expert * scale_stride
    if codebook is not None:
        codebook += expert * codebook_stride
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS_OF_TILE) + tile * WORDS_OF_TILE + t[None, :]
    y_at = y + (expert * N + n)[:, None] * K + t[None, :]
    tile_words = load_words(w_at, row[:, None], BITS)
    s_run = per_group(scale, tile, n, row, stride, groups, GROUP, SLICES, RUN)
    z_run = per_group(zero, tile, n, row, stride, groups, GROUP, SLICES, RUN)
    for j in tl.static_range(SLICES):
        w = slice_words(tile_words, BITS, j, BACKEND)
        if codebook is not None:
            code = (w.to(tl.int32) >> position(BITS, j)) & 15
            value = tl.load(codebook + code + (n * 16 * PER_ROW)[:, None], mask=row[:, None], other=0.0)
        else:
            value = single_codes(w, BITS, position(BITS, j), BACKEND)
        if zero is not None:
            value -= z_run[j // RUN].to(tl.float32)[:, None]
        value *= s_run[j // RUN].to(tl.float32)[:, None]
        k = tile * (SLICES * 32) + j * 32
        tl.store(y_at + k, rounded(value, y.dtype.element_ty, BACKEND), mask=row[:, None] & (k + t < K)[None, :])


def build(weight: PackedInt, y: Tensor, backend: str, offs: Tensor | None = None) -> Launch:
    """The launch that fills y [out, in], or of stacked experts y [E, out, in]; of those, with offs int32 [E], only what
    belongs to experts that have rows.

    The weight's tensors may be slices of rows of larger ones, scale and zero then [groups, out] of columns.
    """
    bits, scale, codebook = weight.bits, weight.scale, weight.codebook
    n, k = y.shape[-2:]
    tiles = weight.packed.shape[-1] // WORDS[bits]
    blocks = -(-n // ROWS)
    group, run = run_length(bits, weight.group_size, k)
    experts, strides = 1, (0, 0, 0)
    if y.dim() == 3:
        experts = len(y)
        strides = weight.packed.stride(0), scale.stride(0), 0 if codebook is None else codebook.stride(0)
    sizes = (n, k, scale.stride(-2), tiles, scale.shape[-2], blocks, *strides)
    per_row = codebook is not None and codebook.shape[-2] > 1
    constexprs = {"BITS": bits, "GROUP": group, "RUN": run, "PER_ROW": per_row, "BLOCK_N": ROWS, "BACKEND": backend}
    options = {"num_warps": 2, "enable_fp_fusion": True}
    tensors = (weight.packed, scale, weight.zero, codebook, offs, y)
    return Launch(dequantize_kernel, (experts * tiles * blocks,), (*tensors, *sizes), constexprs, options)
