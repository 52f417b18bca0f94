"""The default launch configuration of a product on a GPU: an estimate by counting operations, not measured."""

from __future__ import annotations

import functools

from llmq_kernels.planes import TILE, WORDS
from llmq_kernels.triton.config import Config, power, run_length
from llmq_kernels.triton.gpu import Gpu


@functools.lru_cache(maxsize=4096)
def rule(gpu: Gpu, bits: int, m: int, out_features: int, in_features: int, group_size: int) -> Config:
    """A configuration for any GPU, by an estimate that was not measured.

    One row, if unpacking is cheap enough: no tensor cores. Few rows: K divided among eight warps of a program. More
    rows: a fused product, up to four blocks of rows. Beyond that the weight is dequantized once, which is cheaper than
    a fused kernel's disadvantage to the vendor's dense kernel.

    It deliberately selects from few configurations, so that scripts/compile_kernels.py can compile all of them and
    check that none spills: K that does not fill whole tiles has only small configurations, and AMD has one for each of
    two kernels.
    """
    if m == 1 and (bits == 8 or not gpu.wide):
        return _one_row(bits)
    # With more than four groups per tile, a fused product of many rows spills. With 2 and 3 bits a tile has so many
    # dots that tensor memory may not hold their sums: Triton then compiles to a trap.
    short = TILE[bits] > 4 * 32 * run_length(bits, group_size, in_features)[1]
    refused = gpu.backend != "hip" and (short or bits in (2, 3) and gpu.target in ("cuda:100", "cuda:103"))
    few = 32 if refused or bits == 4 and group_size >= 64 else 16 if bits in (4, 8) else 8
    if m <= few and gpu.backend != "hip":
        return _few_rows(gpu, bits, m, out_features, in_features, group_size)
    if refused:
        return Config("dense")
    widest = 32 if bits in (2, 3) or gpu.backend == "hip" else 128 if bits == 4 and gpu.target == "cuda:90" else 64
    if m <= 4 * widest:
        return _many_rows(gpu, bits, m, out_features, in_features, group_size, widest)
    return Config("dense")


def _one_row(bits: int) -> Config:
    # A warp processes 8 tiles of a row at a time: 4096 codes of 3 bits, 1024 of 4.
    warps = 1 if bits == 3 else 4
    return Config("one_row", block_n=2 if bits == 3 else 4, block_m=1, tiles=8 * warps, warps=warps)


def _few_rows(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int) -> Config:
    block_m, warps = power(m, 8) if bits in (4, 8) else 8, 8
    # 64 rows read x half as often: if K fills whole tiles, six warps per multiprocessor remain, and registers suffice.
    whole = k % (warps * TILE[bits]) == 0 and -(-n // 64) * warps >= 6 * gpu.processors
    rows = 64 if whole and block_m <= {4: 16, 8: 8}.get(bits, 0) else 16 if bits == 3 else 32
    stage = warps * (rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2)
    while stage > gpu.shared * 3 // 4:
        warps, stage = warps // 2, stage // 2
    stages = max(1, min(4, 1 + gpu.shared * 3 // 4 // stage))
    # In these cases ptxas spilled registers to raise occupancy.
    registers = None if bits == 4 and group_size >= 64 else 255
    return Config("few_rows", rows, block_m, warps=warps, stages=stages, registers=registers)


def _many_rows(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int, widest: int) -> Config:
    whole = k % TILE[bits] == 0 and gpu.backend != "hip"
    block_m = min(widest, power(m, 32 if widest == 32 else 64)) if whole else min(widest, 64)
    rows = 128 if whole and bits == 4 and -(-n // 128) * -(-m // block_m) * 2 >= gpu.processors else 64
    programs, programs_k = -(-n // rows) * -(-m // block_m), 1
    while whole and rows == 64 and programs_k < 8 and 8 * programs_k * TILE[bits] <= k:
        if programs * programs_k * 2 > gpu.processors:
            break
        programs_k *= 2
    stage = rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2
    # Three stages use two buffers on sm_80 and sm_89: with 3 bits they just fit, and with one buffer ptxas spills.
    stages = max(3 if gpu.backend == "cuda" else 1, min(4, gpu.shared * 7 // 8 // stage))
    prescale = run_length(bits, group_size, k)[1] * 32 < block_m
    registers = 255 if bits in (2, 8) else None
    return Config("many_rows", rows, block_m, 1, programs_k, 8 if rows == 128 else 4, stages, prescale, registers)
