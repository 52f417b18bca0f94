"""A product with an integer weight in planes, or with stacked ones, by one of the three families of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear.planes import HALF, TILE, WORDS
from llmq_kernels.triton import routes, sums
from llmq_kernels.triton.config import Config, dot_length, run_length
from llmq_kernels.triton.few_rows import few_rows_kernel
from llmq_kernels.triton.gpu import on
from llmq_kernels.triton.launch import Launch, Repeated
from llmq_kernels.triton.many_rows import many_rows_kernel
from llmq_kernels.triton.one_row import one_row_kernel
from llmq_kernels.weights import PackedInt

# What Triton raises where a configuration needs more shared memory or registers than the GPU has.
UNFIT = (OutOfResources, PTXASError)
KERNELS = {"one_row": one_row_kernel, "few_rows": few_rows_kernel, "many_rows": many_rows_kernel}


class Product:
    """Products with weights of one kind by one configuration: what does not change from call to call, prepared once.

    One kind: the same sizes, group size, dtypes, zero points or none, bias or none; of experts the same kind of
    routing, and no programs that share K: there are enough without. backend: as `gpu.Gpu.backend`.
    """

    def __init__(self, config: Config, out_features: int, backend: str) -> None:
        self.config, self.backend = config, backend
        self.across, self.sums_across = -(-out_features // max(config.block_n, 1)), -(-out_features // sums.BLOCK)
        self.product, self.sum, self.table = Repeated(), Repeated(), Repeated()

    def __call__(self, x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing | None = None) -> Tensor:
        """x [..., in] · Wᵀ + bias, x contiguous → [..., out] in x's dtype. Raises UNFIT if it cannot run.

        routing: of the rows of x among stacked experts.
        """
        if routing is not None:
            return self._routed(x, weight, bias, routing)
        n, m = weight.out_features, x.numel() // weight.in_features
        config, backend = self.config, self.backend
        y = x.new_empty((*x.shape[:-1], n))
        split = config.programs_k > 1
        out = x.new_empty((config.programs_k, m, n), dtype=torch.float32) if split else y
        grid = (self.across, 1 if config.family == "one_row" else -(-m // config.block_m), config.programs_k)
        tensors = (x, weight.packed, weight.scale, weight.zero, tables_for(x, weight), bias, None, out)
        with on(x.device):
            self.product(grid, tensors, m, lambda: build(config, m, x, weight, bias, out, backend))
            if split:
                summed = (out, bias, y)
                self.sum((self.sums_across, m, 1), summed, m, lambda: sums.build(*summed, config.pdl, backend))
        return y

    def _routed(self, x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing) -> Tensor:
        config, backend, offs = self.config, self.backend, routing.offs
        m, block_m = routing.rows(x), config.block_m
        y = x.new_empty((m, weight.out_features))
        with on(x.device):
            if offs is None:
                blocks, listed = m, routing.chosen
            else:
                blocks = routes.most(m, len(offs), block_m)
                programs = -(-blocks // routes.ENTRIES)
                table = x.new_empty((programs * routes.ENTRIES, 3), dtype=torch.int32)
                made = (offs, table, m, block_m, config.pdl, backend)
                self.table((programs, 1, 1), (offs, table), m, lambda: routes.build(*made))
                listed = table
            tensors = (x, weight.packed, weight.scale, weight.zero, tables_for(x, weight), bias, listed, y)
            grid = (self.across, blocks, 1)
            self.product(grid, tensors, m, lambda: build(config, m, x, weight, bias, y, backend, routing, listed))
        return y


def tables_for(x: Tensor, weight: PackedInt) -> Tensor | None:
    """A codebook as kernels read it, in x's dtype."""
    return None if weight.tables is None else weight.tables.select(-3, HALF.index(x.dtype))


def build(
    config: Config,
    m: int,
    x: Tensor,
    weight: PackedInt,
    bias: Tensor | None,
    y: Tensor,
    backend: str,
    routing: Routing | None = None,
    listed: Tensor | None = None,
) -> Launch:
    """The launch of a product of m rows. y: [..., out], or float32 [programs_k, m, out] if programs share K.

    routing, listed: of the rows among stacked experts, and as the kernel reads it (`routes.route`).
    """
    bits, n, k = weight.bits, weight.out_features, weight.in_features
    tiles = weight.packed.shape[-1] // WORDS[bits]
    group, run = run_length(bits, weight.group_size, k)
    constexprs: dict[str, Any] = {
        "BITS": bits,
        "GROUP": group,
        "RUN": run,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PER_ROW": weight.tables is not None and weight.tables.shape[-1] > 1,
        "PDL": config.pdl,
        "BACKEND": backend,
    }
    grid: tuple[int, ...] = (-(-n // config.block_n), 1, 1)
    if config.family == "one_row":
        constexprs["TILES"] = config.tiles
    else:
        grid = (grid[0], -(-m // config.block_m), config.programs_k)
        constexprs["PROGRAMS_K"] = config.programs_k
        even = k == tiles * TILE[bits]
        if config.family == "few_rows":
            constexprs["WARPS_K"] = config.warps
            constexprs["EVEN_K"] = even and tiles % config.warps == 0
        else:
            constexprs["EVEN_K"] = even
            prescale = config.prescale and weight.scale.dtype == x.dtype
            constexprs["PRESCALE"] = prescale
            constexprs["DOT"] = dot_length(bits, run, prescale)
    experts = 0
    if routing is not None:
        experts = len(weight.packed)
        blocks = m if routing.offs is None else routes.most(m, experts, config.block_m)
        grid = (grid[0], blocks, 1)
    constexprs["PAIRS"] = routing is not None and routing.offs is None
    tensors = (x, weight.packed, weight.scale, weight.zero, tables_for(x, weight), bias, listed, y)
    sizes = (m, n, k, tiles, weight.scale.shape[-2], experts, 1 if routing is None else routing.choices)
    return Launch(KERNELS[config.family], grid, (*tensors, *sizes), constexprs, config.options(backend))
