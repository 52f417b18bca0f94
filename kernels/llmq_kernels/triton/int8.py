"""A product of 8-bit integers: x is rounded per token, or by a known scale, and multiplied by an int8 weight.

Two kernels. The first rounds x in the very steps of compressed-tensors, each in x's own dtype, so that its integers
are bit for bit those that the accuracy was measured with (`reference.round_input`). The second multiplies on integer
tensor cores, sums exactly in int32, and applies both scales and the bias at the end, in float32. Reading an int8 weight
needs no arithmetic, so few rows run on the same kernel, with more of K in flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton.configs import Variant
from llmq_kernels.triton.target import COMPILED, on, rounded, target

# Beyond this many inputs, a sum of products of two numbers down to −128 might pass the ends of int32.
LONGEST = (1 << 31) // (128 * 128) - 1


@triton.jit
def round_kernel(
    x, input_scale, codes, scale, K, DTYPE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, TARGET: tl.constexpr
):
    """A row of x [M, K] a program: codes int8 [M, K] and the scale that they stand for in units of, float32 [M].

    input_scale: [1] or None. DTYPE: x's; EPS: its epsilon, the scale of a row of zeros.
    """
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * K
    if input_scale is None:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            most = tl.maximum(most, tl.abs(tl.load(x + at + start + k, mask=start + k < K, other=0.0).to(tl.float32)))
        # 1-element blocks, not scalars: the interpreter's scalars are numpy's, which have other casts.
        step = rounded(tl.div_rn(tl.max(most, 0, keep_dims=True), 127.5), DTYPE, TARGET).to(tl.float32)
        step = tl.where(step == 0.0, EPS, step)
    else:
        step = rounded(tl.load(input_scale + tl.arange(0, 1)).to(tl.float32), DTYPE, TARGET).to(tl.float32)
    strange = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        value = tl.load(x + at + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        level = rounded(tl.div_rn(value, step), DTYPE, TARGET).to(tl.float32)
        level = tl.minimum(tl.maximum(level, -128.0), 127.0)
        # Adding 1.5 · 2²³ leaves no bit for fractions: float32's own rounding, half to even, does it.
        level = (level + 12582912.0) - 12582912.0
        # A maximum passes over what is no number; the row's scale must not.
        strange = tl.maximum(strange, (value != value).to(tl.float32))
        tl.store(codes + at + start + k, level.to(tl.int8), mask=start + k < K)
    step = tl.where(tl.max(strange, 0, keep_dims=True) > 0.0, float("nan"), step)
    tl.store(scale + row + tl.arange(0, 1), step)


@triton.jit
def int8_kernel(
    x, weight, x_scale, scale, bias, y, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """y [M, N] = int8 x [M, K] · int8 weight [N, K]ᵀ, times x_scale float32 [M] and scale [N], + bias [N]."""
    # Neighbouring programs share rows of the weight, which is what is large.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    tl.store(at, rounded(value, y.dtype.element_ty, TARGET), mask=(m < M)[:, None] & (n < N)[None, :])


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x on the signed 8-bit grid, as `reference.round_input` rounds it, bit for bit.

    x: float32, bfloat16 or float16 [M, in], contiguous; input_scale: float [1], or None for one scale per token.
    Returns int8 [M, in] and the scales, exact in float32, [M].
    """
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = round_block(width)
    with on(x.device):
        round_kernel[(rows,)](
            x, input_scale, codes, scale, width, DTYPE=TYPES[x.dtype], EPS=torch.finfo(x.dtype).eps, BLOCK=block,
            TARGET=target(x.device), num_warps=8 if block > 2048 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to 8 bits.

    x: float32, bfloat16 or float16 [M, in], contiguous; weight: int8 [out, in]; scale: float [out, 1]; input_scale: [1]
    or None; bias: float [out]. Returns [M, out] in x's dtype, rounded once. Raises ValueError where int32 sums might
    overflow: at 131072 inputs.
    """
    rows, width = x.shape
    out = weight.shape[0]
    if width > LONGEST:
        raise ValueError(f"int32 sums hold the products of up to {LONGEST} inputs, not {width}")
    codes, x_scale = round_input(x, input_scale)
    y = x.new_empty(rows, out)
    block_m, block_n, block_k, warps, stages = tile(rows, out)
    with on(x.device):
        int8_kernel[(triton.cdiv(rows, block_m), triton.cdiv(out, block_n))](
            codes, weight.contiguous(), x_scale, scale.contiguous(), bias, y, rows, out, width,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, TARGET=target(x.device), num_warps=warps,
            num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def round_block(width: int) -> int:
    """Values of a row that a program holds at a time."""
    return min(8192, max(256, int(triton.next_power_of_2(width))))


def tile(rows: int, out_features: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages.

    Few rows: narrow tiles, so that a weight of 4096 rows fills a large GPU, and a long K in flight. Many: square ones.
    """
    if rows <= 16:
        return 16, 32 if out_features <= 8192 else 64, 256, 4, 4
    if rows <= 32:
        return 32, 64, 128, 4, 4
    if rows <= 64:
        return 64, 64, 128, 4, 4
    return 128, 128, 128, 8, 3


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched, for scripts/compile_kernels.py."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for (machine, gpus), (name, dtype) in itertools.product(COMPILED.items(), names.items()):
        for static, width in itertools.product((False, True), (256, 4096, 14336)):
            block = round_block(width)
            yield Variant(
                f"int8 round {'static' if static else 'token'} {name} block {block}", round_kernel,
                {"x": f"*{name}", "codes": "*i8", "scale": "*fp32", "K": "i32"}
                | ({"input_scale": "*fp32"} if static else {}),
                {"DTYPE": TYPES[dtype], "EPS": torch.finfo(dtype).eps, "BLOCK": block, "TARGET": machine}
                | ({} if static else {"input_scale": None}),
                8 if block > 2048 else 4, 1, ("x", "codes", "scale", "K"), gpus,
            )  # fmt: skip
        for rows, out in ((16, 4096), (16, 14336), (32, 4096), (64, 4096), (128, 4096)):
            block_m, block_n, block_k, warps, stages = tile(rows, out)
            yield Variant(
                f"int8 product {name} rows {rows} tile {block_n}", int8_kernel,
                {
                    "x": "*i8", "weight": "*i8", "x_scale": "*fp32", "scale": "*fp32", "bias": f"*{name}",
                    "y": f"*{name}", "M": "i32", "N": "i32", "K": "i32",
                },
                {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "TARGET": machine}, warps, stages,
                ("x", "weight", "x_scale", "scale", "bias", "y", "N", "K"), gpus,
            )  # fmt: skip
