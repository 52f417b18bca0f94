"""Codes to a dense weight: for products with so many rows that the vendor's dense kernel is worth a copy of the weight.

It writes four times what it reads (4 bits to 16), so it is bound by memory however codes are unpacked: values are
computed in float32 and rounded once, exactly as `reference.dequantize` does.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.configs import KNOWN, TILE, WORDS, Variant, run_length
from llmq_kernels.triton.unpack import per_group, plane, position, single_codes, sixteenth, slices, words

ROWS = 16


@triton.jit(do_not_specialize=["tiles", "groups"])
def dequantize_kernel(
    packed,
    scale,
    zero,
    y,
    N,
    K,
    stride,
    tiles,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    """y [N, K] = (codes − zero) · scale. packed: int16 [N, tiles · words]; scale, zero: [groups, N], stride apart."""
    SLICES: tl.constexpr = slices(BITS)
    WORDS_OF_TILE: tl.constexpr = words(BITS)
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, 32)
    row = n < N
    w_at = packed + n.to(tl.int64)[:, None] * (tiles * WORDS_OF_TILE) + tile * WORDS_OF_TILE + t[None, :]
    y_at = y + n.to(tl.int64)[:, None] * K + t[None, :]
    w0 = tl.load(w_at, mask=row[:, None], other=0)
    if BITS == 3:
        w1 = tl.load(w_at + 32, mask=row[:, None], other=0)
        w2 = tl.load(w_at + 64, mask=row[:, None], other=0)
    s_run = per_group(scale, tile, n, row, stride, groups, GROUP, SLICES, RUN)
    z_run = per_group(zero, tile, n, row, stride, groups, GROUP, SLICES, RUN)
    for j in tl.static_range(SLICES):
        if plane(BITS, j) == 0:
            w = w0
        elif plane(BITS, j) == 1:
            w = w1
        elif plane(BITS, j) == 2:
            w = w2
        else:
            w = sixteenth(w0, w1, w2, MODE)
        value = single_codes(w, BITS, position(BITS, j), MODE)
        if zero is not None:
            value -= z_run[j // RUN].to(tl.float32)[:, None]
        value *= s_run[j // RUN].to(tl.float32)[:, None]
        k = tile * (SLICES * 32) + j * 32
        tl.store(y_at + k, value.to(y.dtype.element_ty), mask=row[:, None] & (k + t < K)[None, :])


def launch(
    packed: Tensor, scale: Tensor, zero: Tensor | None, y: Tensor, bits: int, group_size: int, mode: str
) -> Tensor:
    """y [N, K] filled; scale and zero [groups, N] may be columns of larger ones."""
    n, k = y.shape
    tiles = packed.shape[1] // WORDS[bits]
    group, run = run_length(bits, group_size, k)
    dequantize_kernel[(tiles, triton.cdiv(n, ROWS))](
        packed,
        scale,
        zero,
        y,
        n,
        k,
        scale.stride(0),
        tiles,
        scale.shape[0],
        BITS=bits,
        GROUP=group,
        RUN=run,
        BLOCK_N=ROWS,
        MODE=mode,
        num_warps=2,
    )
    return y


def variants() -> Iterator[Variant]:
    """Every one."""
    arguments = {"packed": "*i16", "scale": "*bf16", "zero": "*i8", "y": "*bf16"}
    sizes = dict.fromkeys(("N", "K", "stride", "tiles", "groups"), "i32")
    for target, mode in {gpu.target: gpu.mode for gpu in KNOWN}.items():
        for bits in TILE:
            for group_size in (128, 32):
                group, run = run_length(bits, group_size, 4096)
                constexprs = {"BITS": bits, "GROUP": group, "RUN": run, "BLOCK_N": ROWS, "MODE": mode}
                name = f"dequantize {bits} bits group {group} zero"
                wide = (*arguments, "N", "K", "stride")
                yield Variant(name, dequantize_kernel, arguments | sizes, constexprs, 2, 1, wide, (target,))
