"""A product with a weight of 4-bit codes into a codebook of 16 numbers (NF4), as bitsandbytes stores it.

By rows of x: up to 4, every weight times every row in registers, exact but for the float32 sums; up to FUSED, on tensor
cores, split along K where the weight is small for the GPU; beyond that, and where 8 does not divide K, the weight is
written out and torch multiplies. W is rounded to x's dtype in all but the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.triton.configs import Variant
from llmq_kernels.triton.nf4_kernels import dequantize_kernel, gemm_kernel, gemv_kernel, sum_kernel
from llmq_kernels.triton.target import COMPILED, on, processors, target

# The most rows that the tensor-core kernel takes before writing the weight out is expected to be cheaper.
FUSED = 128
# Bytes of codes that a program writes out.
DEQUANTIZE_BLOCK = 1024


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight of codes into a codebook.

    x: bfloat16 or float16 [M, in], contiguous; packed: uint8 [ceil(out·in/2)], the first of two codes in the high half,
    along the flattened weight; absmax: float32 [blocks], or uint8 with nested_absmax float32 [ceil(blocks/256)] and
    nested_codebook float32 [256]; codebook: float32 [16]; bias: [out]. Returns [M, out] in x's dtype. Raises ValueError
    when the block is not a power of two of at least 32.
    """
    _check(block_size, out_features, in_features)
    rows = x.shape[0]
    weight = (packed, absmax, codebook, nested_absmax, nested_codebook, offset)
    if rows > FUSED or in_features % 8 or packed.data_ptr() % 4:
        dense = dequantize(*weight, out_features, in_features, block_size, products.product_dtype(x))
        return products.linear(x, dense, bias)
    words = in_features // 8
    run = block_size // 8
    y = x.new_empty(rows, out_features)
    packed = packed.view(-1).view(torch.int32)
    weight = (packed, absmax, codebook, nested_absmax, nested_codebook, offset)
    with on(x.device):
        if rows <= 4:
            block_n, block_w = gemv_tile(out_features)
            gemv_kernel[(triton.cdiv(out_features, block_n),)](
                x, *weight, bias, y, out_features, words, ROWS=rows, BLOCK_N=block_n, BLOCK_W=block_w, RUN=run,
                WHOLE=words % run == 0 and block_w % run == 0, TARGET=target(x.device), num_warps=4, num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
            return y
        block_m, block_n, block_w, warps, stages = gemm_tile(rows)
        grid = (triton.cdiv(out_features, block_n), triton.cdiv(rows, block_m))
        split = _split(grid[0] * grid[1], triton.cdiv(words, block_w), processors(x.device))
        parts = y if split == 1 else x.new_empty(split, rows, out_features, dtype=torch.float32)
        gemm_kernel[(*grid, split)](
            x, *weight, bias, parts, rows, out_features, words,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_W=block_w, RUN=run,
            WHOLE=words % run == 0 and block_w % run == 0, SPLIT=split, TARGET=target(x.device), num_warps=warps,
            num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split > 1:
            size = rows * out_features
            sum_kernel[(triton.cdiv(size, 1024),)](
                parts, bias, y, size, out_features, SPLIT=split, BLOCK=1024, TARGET=target(x.device), num_warps=4
            )
    return y


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in]: codebook[code] · magnitude in float32, rounded once to `dtype`.

    Arguments as in `linear`; dtype: float32, bfloat16 or float16. Bit for bit bitsandbytes' dequantize_4bit, for which
    products and sums are rounded one by one (no fused multiply-add). Raises ValueError as `linear` does.
    """
    _check(block_size, out_features, in_features)
    size = out_features * in_features
    weight = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    with on(packed.device):
        dequantize_kernel[(triton.cdiv(size, 2 * DEQUANTIZE_BLOCK),)](
            packed, absmax, codebook, nested_absmax, nested_codebook, offset, weight, size,
            BLOCK=DEQUANTIZE_BLOCK, BLOCK_SIZE=block_size, TARGET=target(packed.device), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return weight


def gemv_tile(out_features: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_W of four warps: a word a thread; eight rows of W where that still fills a large GPU."""
    return (8 if out_features >= 4096 else 4), 128


def gemm_tile(rows: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_W, warps and stages for so many rows of x."""
    if rows <= 16:
        return 16, 64, 16, 4, 4
    if rows <= 32:
        return 32, 128, 8, 4, 3
    return 64, 128, 16, 8, 2


def _split(tiles: int, steps: int, processors: int) -> int:
    """Into how many parts K is cut: two tiles for each multiprocessor, and four steps at least in a part."""
    return max(1, min(2 * processors // tiles, steps // 4, 16))


def _check(block_size: int, out_features: int, in_features: int) -> None:
    if block_size < 32 or block_size & (block_size - 1):
        raise ValueError(f"a block of NF4 has 32, 64, 128 … values, not {block_size}")
    if out_features * in_features >= 1 << 32:
        raise ValueError(f"a weight of [{out_features}, {in_features}] is beyond the kernels' 32-bit counters")


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched, for scripts/compile_kernels.py."""
    for (machine, gpus), nested in itertools.product(COMPILED.items(), (False, True)):
        weight = {"packed": "*i32", "absmax": "*fp32", "codebook": "*fp32", "offset": "fp32"}
        if nested:
            weight |= {"absmax": "*u8", "nested_absmax": "*fp32", "nested_codebook": "*fp32"}
        # What is None has no type.
        nothing: dict[str, object] = {} if nested else {"nested_absmax": None, "nested_codebook": None}
        pointers = tuple(name for name, kind in weight.items() if kind.startswith("*"))
        for dtype, whole in itertools.product(("bf16", "fp16"), (True, False)):
            types = {**weight, "x": f"*{dtype}", "bias": f"*{dtype}", "y": f"*{dtype}"}
            types |= {"M": "i32", "N": "i32", "words": "i32"}
            label = f"{'nested' if nested else 'plain'} {dtype} {'whole' if whole else 'ragged'}"
            common = {**nothing, "RUN": 8, "WHOLE": whole, "TARGET": machine}
            for rows, out in itertools.product((1, 2, 3, 4), (1024, 4096)):
                block_n, block_w = gemv_tile(out)
                yield Variant(
                    f"nf4 gemv {label} rows {rows} tile {block_n}", gemv_kernel,
                    {name: kind for name, kind in types.items() if name != "M"},
                    {**common, "ROWS": rows, "BLOCK_N": block_n, "BLOCK_W": block_w}, 4, 1,
                    (*pointers, "x", "bias", "y", "N"), gpus,
                )  # fmt: skip
            for rows, split in itertools.product((16, 32, 64), (1, 4)):
                block_m, block_n, block_w, warps, stages = gemm_tile(rows)
                yield Variant(
                    f"nf4 gemm {label} rows {rows} split {split}", gemm_kernel,
                    types | ({"y": "*fp32"} if split > 1 else {}),
                    {**common, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_W": block_w, "SPLIT": split}, warps,
                    stages, (*pointers, "x", "bias", "y", "N", "words"), gpus,
                )  # fmt: skip
        for dtype in ("bf16", "fp16", "fp32"):
            yield Variant(
                f"nf4 dequantize {'nested' if nested else 'plain'} {dtype}", dequantize_kernel,
                weight | {"packed": "*u8", "weight": f"*{dtype}", "size": "i32"},
                {**nothing, "BLOCK": DEQUANTIZE_BLOCK, "BLOCK_SIZE": 64, "TARGET": machine}, 4, 1,
                (*pointers, "weight", "size"), gpus,
            )  # fmt: skip
        yield Variant(
            "nf4 sum", sum_kernel, {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "size": "i32", "N": "i32"},
            {"SPLIT": 4, "BLOCK": 1024, "TARGET": machine}, 4, 1, ("parts", "bias", "y", "size", "N"), gpus,
        )  # fmt: skip
