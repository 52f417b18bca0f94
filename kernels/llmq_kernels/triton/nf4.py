"""A product with a weight of 4-bit codes into a codebook of 16 numbers (NF4), as bitsandbytes stores it.

By rows of x: up to 4, all products in registers, exact except for the float32 sums; up to FUSED, on tensor cores, split
along K if the weight is small for the GPU; beyond that, or if K is not a multiple of 8, the weight is dequantized and
torch multiplies. W is rounded to x's dtype in all but the first case.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.triton import sums
from llmq_kernels.triton.gpu import Gpu, gpu_of
from llmq_kernels.triton.launch import Launch, launch
from llmq_kernels.triton.nf4_kernels import nf4_dequantize_kernel, nf4_many_rows_kernel, nf4_one_row_kernel
from llmq_kernels.weights import PackedCodebook

# Above this many rows, dequantizing the weight is expected to be faster than the tensor-core kernel.
FUSED = 128
# Bytes of codes that a program dequantizes.
DEQUANTIZE_BLOCK = 1024


@dataclass(frozen=True)
class Nf4Config:
    """One way to run a product. one_row: without tensor cores, for up to 4 rows; block_n, block_m: rows of the weight
    and of x per program; block_w: words of 8 codes along K per step; programs_k: programs that share K.
    """

    one_row: bool
    block_n: int
    block_m: int
    block_w: int
    warps: int
    stages: int
    programs_k: int = 1


@functools.lru_cache(maxsize=4096)
def choose(gpu: Gpu, m: int, out_features: int, in_features: int) -> Nf4Config:
    """How to run x [m, in] · Wᵀ, m ≤ FUSED; an estimate, not measured."""
    if m <= 4:
        # One word per thread; eight rows of W if that still fills a large GPU.
        return Nf4Config(True, 8 if out_features >= 4096 else 4, m, 128, 4, 1)
    block_m, block_n, block_w, warps, stages = (
        (16, 64, 16, 4, 4) if m <= 16 else (32, 128, 8, 4, 3) if m <= 32 else (64, 128, 16, 8, 2)
    )
    # K is split into parts of at least four steps if there are fewer than two tiles per multiprocessor.
    tiles, steps = -(-out_features // block_n) * -(-m // block_m), -(-in_features // 8 // block_w)
    programs_k = max(1, min(2 * gpu.processors // tiles, steps // 4, 16))
    return Nf4Config(False, block_n, block_m, block_w, warps, stages, programs_k)


def linear(x: Tensor, weight: PackedCodebook, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias.

    x: bfloat16 or float16 [M, in], contiguous; bias: [out]. Returns [M, out] in x's dtype. Raises ValueError if the
    block size is not a power of two of at least 32.
    """
    check(weight)
    m, n = x.shape[0], weight.out_features
    if m > FUSED or weight.in_features % 8 or weight.packed.data_ptr() % 4:
        return products.linear(x, dequantize(weight, products.product_dtype(x)), bias)
    gpu = gpu_of(x.device)
    config = choose(gpu, m, n, weight.in_features)
    y = x.new_empty(m, n)
    if config.programs_k == 1:
        launch(x.device, build(config, x, weight, bias, y, gpu.backend))
        return y
    parts = x.new_empty(config.programs_k, m, n, dtype=torch.float32)
    launch(x.device, build(config, x, weight, bias, parts, gpu.backend), sums.build(parts, bias, y, False, gpu.backend))
    return y


def build(config: Nf4Config, x: Tensor, weight: PackedCodebook, bias: Tensor | None, y: Tensor, backend: str) -> Launch:
    """The launch of the product. y: [M, out], or float32 [programs_k, M, out] if programs share K."""
    m, n, words, run = x.shape[0], weight.out_features, weight.in_features // 8, weight.block_size // 8
    nested = weight.nested_absmax, weight.nested_codebook, weight.offset
    tensors = (x, weight.packed.view(torch.int32), weight.absmax, weight.codebook, *nested, bias, y)
    constexprs: dict[str, Any] = {
        "BLOCK_N": config.block_n,
        "BLOCK_W": config.block_w,
        "RUN": run,
        "WHOLE": words % run == 0 and config.block_w % run == 0,
        "BACKEND": backend,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    across = -(-n // config.block_n)
    if config.one_row:
        constexprs["ROWS"] = m
        return Launch(nf4_one_row_kernel, (across,), (*tensors, n, words), constexprs, options)
    constexprs["BLOCK_M"] = config.block_m
    constexprs["PROGRAMS_K"] = config.programs_k
    grid = (across, -(-m // config.block_m), config.programs_k)
    return Launch(nf4_many_rows_kernel, grid, (*tensors, m, n, words), constexprs, options)


def dequantize(weight: PackedCodebook, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]: codebook[code] · magnitude in float32, rounded once to `dtype`.

    dtype: float32, bfloat16 or float16. Bit for bit equal to bitsandbytes' dequantize_4bit; so products and sums are
    rounded separately (no fused multiply-add). Raises ValueError as `linear` does.
    """
    check(weight)
    dense = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.packed.device)
    launch(dense.device, build_dequantize(weight, dense, gpu_of(dense.device).backend))
    return dense


def build_dequantize(weight: PackedCodebook, dense: Tensor, backend: str) -> Launch:
    """The launch that fills dense [out, in]."""
    size = weight.out_features * weight.in_features
    nested = weight.nested_absmax, weight.nested_codebook, weight.offset
    arguments = (weight.packed, weight.absmax, weight.codebook, *nested, dense, size)
    constexprs = {"BLOCK": DEQUANTIZE_BLOCK, "BLOCK_SIZE": weight.block_size, "BACKEND": backend}
    grid = (-(-size // (2 * DEQUANTIZE_BLOCK)),)
    return Launch(nf4_dequantize_kernel, grid, arguments, constexprs, {"num_warps": 4, "enable_fp_fusion": False})


def check(weight: PackedCodebook) -> None:
    """Raises ValueError for a weight that the kernels cannot read."""
    block_size, size = weight.block_size, weight.out_features * weight.in_features
    if block_size < 32 or block_size & (block_size - 1):
        raise ValueError(f"a block of NF4 has 32, 64, 128 … values, not {block_size}")
    if size >= 1 << 32:
        raise ValueError(
            f"a weight of [{weight.out_features}, {weight.in_features}] is beyond the kernels' 32-bit counters"
        )
