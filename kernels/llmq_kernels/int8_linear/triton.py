"""Products of 8-bit integers: x is rounded per token, or with a given scale, and multiplied by an int8 weight.

`triton.inputs` rounds x. The kernel here multiplies on integer tensor cores, sums exactly in int32, and applies both
scales and the bias at the end, in float32. An int8 weight needs no unpacking, so few rows use the same kernel, with
larger blocks along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.arithmetic import rounded
from llmq_kernels.triton.gpu import gpu_of
from llmq_kernels.triton.inputs import round_input
from llmq_kernels.triton.launch import Launch, launch
from llmq_kernels.weights import PackedInt8

# Blocks of rows of x that are multiplied with a block of the weight before the next. Programs that run at the same time
# (132 on an H100) then read 16 blocks of x and 8 of the weight; all blocks of many rows would be as many of x, and one.
ROWS = 16


@triton.jit
def block_of(program, blocks_m, blocks_n, ROWS: tl.constexpr):
    """The block of rows of x and the block of the weight of a program: ROWS blocks of x at a time, along the weight."""
    band = program // (ROWS * blocks_n)
    rows = tl.minimum(blocks_m - band * ROWS, ROWS)
    inside = program % (ROWS * blocks_n)
    return band * ROWS + inside % rows, inside // rows


@triton.jit
def int8_kernel(
    x, weight, x_scale, scale, bias, y, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """y [M, N] = int8 x [M, K] · int8 weight [N, K]ᵀ, times x_scale float32 [M] and scale [N], + bias [N]."""
    block_m, block_n = block_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), ROWS)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m.to(tl.int64)[:, None] * K + k[None, :]
    w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < K)[None, :]
        a = tl.load(x_at + start, mask=(m < M)[:, None] & inside, other=0)
        b = tl.load(w_at + start, mask=(n < N)[:, None] & inside, other=0)
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
    rows = tl.load(x_scale + m, mask=m < M, other=0.0)
    columns = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    value = total.to(tl.float32) * rows[:, None] * columns[None, :]
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, rounded(value, y.dtype.element_ty, BACKEND), mask=(m < M)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to 8 bits.

    x: float32, bfloat16 or float16 [M, in], contiguous; bias: float [out]. Returns [M, out] in x's dtype, rounded once.
    Raises ValueError if int32 sums might overflow: from 131072 inputs on.
    """
    weight.check_sums()
    codes, x_scale = round_input(x, weight.input_scale, torch.int8)
    y = x.new_empty(x.shape[0], weight.out_features)
    launch(x.device, build(codes, x_scale, weight, bias, y, gpu_of(x.device).backend))
    return y


def build(codes: Tensor, x_scale: Tensor, weight: PackedInt8, bias: Tensor | None, y: Tensor, backend: str) -> Launch:
    """The launch that fills y [M, out] with the product of rounded inputs: codes int8 [M, in], x_scale float32 [M]."""
    rows, width = codes.shape
    out = weight.out_features
    block_m, block_n, block_k, warps, stages = tile(rows, out)
    tensors = (codes, weight.packed.contiguous(), x_scale, weight.scale.contiguous(), bias, y)
    constexprs = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "ROWS": ROWS, "BACKEND": backend}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    grid = (-(-rows // block_m) * -(-out // block_n),)
    return Launch(int8_kernel, grid, (*tensors, rows, out, width), constexprs, options)


def tile(rows: int, out_features: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages.

    Few rows: narrow tiles, so that a weight of 4096 rows fills a large GPU, with large blocks along K. Many: square
    tiles.
    """
    if rows <= 16:
        return 16, 32 if out_features <= 8192 else 64, 256, 4, 4
    if rows <= 32:
        return 32, 64, 128, 4, 4
    if rows <= 64:
        return 64, 64, 128, 4, 4
    return 128, 128, 128, 8, 3
