"""Dequantize to a dense weight, for products with so many rows that the vendor's dense kernel is worth the copy.

It writes four times the bytes that it reads (4 bits to 16), so it is memory-bound however codes are unpacked: values
are computed in float32 and rounded once, exactly as in `reference.dequantize`.
"""

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.planes import WORDS
from llmq_kernels.triton.arithmetic import rounded
from llmq_kernels.triton.config import run_length
from llmq_kernels.triton.launch import Launch
from llmq_kernels.triton.unpack import load_words, per_group, position, single_codes, slice_words, slices, words
from llmq_kernels.weights import PackedInt

ROWS = 16


@triton.jit(do_not_specialize=["tiles", "groups"])
def dequantize_kernel(
    packed,
    scale,
    zero,
    codebook,
    y,
    N,
    K,
    stride,
    tiles,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """y [N, K] = (codes − zero) · scale, or codebook[codes] · scale, of float32 [N, 16] with PER_ROW, else [16].

    packed: int16 [N, tiles · words]; scale, zero: [groups, N], strided.
    """
    SLICES: tl.constexpr = slices(BITS)
    WORDS_OF_TILE: tl.constexpr = words(BITS)
    # One axis: the others hold 65,535 programs, fewer than the stacked rows of many experts need.
    tile = tl.program_id(0) % tiles
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, 32)
    row = n < N
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS_OF_TILE) + tile * WORDS_OF_TILE + t[None, :]
    y_at = y + n.to(tl.int64)[:, None] * K + t[None, :]
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


def build(weight: PackedInt, y: Tensor, backend: str) -> Launch:
    """The launch that fills y [out, in]; scale and zero [groups, out] may be column slices of larger tensors."""
    bits, scale = weight.bits, weight.scale
    n, k = y.shape
    tiles = weight.packed.shape[1] // WORDS[bits]
    group, run = run_length(bits, weight.group_size, k)
    arguments = (weight.packed, scale, weight.zero, weight.codebook, y, n, k, scale.stride(0), tiles, scale.shape[0])
    per_row = weight.codebook is not None and weight.codebook.shape[0] > 1
    constexprs = {"BITS": bits, "GROUP": group, "RUN": run, "PER_ROW": per_row, "BLOCK_N": ROWS, "BACKEND": backend}
    options = {"num_warps": 2, "enable_fp_fusion": True}
    return Launch(dequantize_kernel, (tiles * -(-n // ROWS),), arguments, constexprs, options)
