"""A product with an integer weight in planes, by one of the three families of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.planes import TILE, WORDS
from llmq_kernels.triton import sums
from llmq_kernels.triton.config import Config, run_length
from llmq_kernels.triton.few_rows import few_rows_kernel
from llmq_kernels.triton.launch import Launch, launch
from llmq_kernels.triton.many_rows import many_rows_kernel
from llmq_kernels.triton.one_row import one_row_kernel
from llmq_kernels.weights import PackedInt

KERNELS = {"one_row": one_row_kernel, "few_rows": few_rows_kernel, "many_rows": many_rows_kernel}


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None, config: Config, backend: str) -> Tensor:
    """x [M, in] · Wᵀ + bias, x contiguous → [M, out] in x's dtype. backend: as `gpu.Gpu.backend`."""
    m, n = x.shape[0], weight.out_features
    y = x.new_empty(m, n)
    if config.programs_k == 1:
        launch(x.device, build(config, x, weight, bias, y, backend))
        return y
    parts = x.new_empty(config.programs_k, m, n, dtype=torch.float32)
    launch(x.device, build(config, x, weight, bias, parts, backend), sums.build(parts, bias, y, backend))
    return y


def build(config: Config, x: Tensor, weight: PackedInt, bias: Tensor | None, y: Tensor, backend: str) -> Launch:
    """The launch of the product. y: [M, out], or float32 [programs_k, M, out] if programs share K."""
    bits, n, k, m = weight.bits, weight.out_features, weight.in_features, x.shape[0]
    tiles = weight.packed.shape[1] // WORDS[bits]
    group, run = run_length(bits, weight.group_size, k)
    constexprs: dict[str, Any] = {
        "BITS": bits,
        "GROUP": group,
        "RUN": run,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BACKEND": backend,
    }
    grid: tuple[int, ...] = (-(-n // config.block_n),)
    if config.family == "one_row":
        constexprs["TILES"] = config.tiles
    else:
        grid = (*grid, -(-m // config.block_m), config.programs_k)
        constexprs["PROGRAMS_K"] = config.programs_k
        even = k == tiles * TILE[bits]
        if config.family == "few_rows":
            constexprs["WARPS_K"] = config.warps
            constexprs["EVEN_K"] = even and tiles % config.warps == 0
        else:
            constexprs["EVEN_K"] = even
            constexprs["PRESCALE"] = config.prescale and weight.scale.dtype == x.dtype
    arguments = (x, weight.packed, weight.scale, weight.zero, bias, y, m, n, k, tiles, weight.scale.shape[0])
    return Launch(KERNELS[config.family], grid, arguments, constexprs, config.options(backend))
