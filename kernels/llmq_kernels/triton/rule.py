"""The default launch configuration of a product on a GPU: an estimate by counting operations, not measured."""

from __future__ import annotations

import functools
from dataclasses import replace

from llmq_kernels.int_linear.planes import TILE, WORDS
from llmq_kernels.triton.config import Config, dot_length, power, run_length
from llmq_kernels.triton.gpu import Gpu

# A GPU counts as busy if this share of its multiprocessors has a program: 8192 rows make 128 for 132.
BUSY = 0.9
# The most programs that share K; each must have four tiles.
MOST_SPLIT = 8
# The most dots of a tile whose inputs AMD's registers can hold for more than one stage: a dot takes 50 of 512.
MOST_DOTS = 8


@functools.lru_cache(maxsize=4096)
def rule(
    gpu: Gpu, bits: int, m: int, out_features: int, in_features: int, group_size: int, codebook: bool = False
) -> Config:
    """A configuration for any GPU, by an estimate that was not measured. codebook: codes count entries of one.

    One row, if unpacking is cheap enough: no tensor cores. Few rows: K divided among eight warps of a program. More
    rows: a fused product, up to four blocks of rows. Beyond that the weight is dequantized once, which is cheaper than
    a fused kernel's disadvantage to the vendor's dense kernel.

    It deliberately selects from few configurations, so that scripts/compile_kernels.py can compile all of them and
    check that none spills: K that does not fill whole tiles has only small configurations, and AMD has one for each of
    two kernels.
    """
    if m == 1 and (bits == 8 or not gpu.wide):
        return _one_row(gpu, bits, group_size)
    # With more than four groups per tile, a fused product of many rows spills. With 2 and 3 bits a tile has so many
    # dots that tensor memory may not hold their sums: Triton then compiles to a trap. With 3 bits, only Hopper's
    # registers hold them.
    run = run_length(bits, group_size, in_features)[1]
    short = TILE[bits] > 4 * 32 * run
    crowded = bits in (2, 3) and gpu.tensor_memory or bits == 3 and gpu.target != "cuda:90"
    refused = gpu.backend != "hip" and (short or crowded)
    hopper = bits == 4 and gpu.target == "cuda:90"
    few = 32 if refused or bits == 4 and group_size >= 64 and not hopper else 16 if bits in (4, 8) else 8
    few = min(few, 16) if codebook else few
    if m <= few and gpu.backend != "hip":
        return _few_rows(gpu, bits, m, out_features, in_features, group_size, codebook)
    widest = 32 if bits in (2, 3) or gpu.backend == "hip" else 128 if hopper else 64
    if codebook:  # its tables take registers, of which Hopper's products leave more
        widest = min(widest, 64 if hopper else 32)
    if refused or m > 4 * widest:
        return Config("dense")
    config = _many_rows(gpu, bits, m, out_features, in_features, group_size, widest, hopper or not codebook)
    # Dots whose sums go into the next are what Triton before 3.9 gets wrong there (issue 10821).
    return Config("dense") if config.prescale and gpu.tensor_memory else config


@functools.lru_cache(maxsize=4096)
def routed_rule(
    gpu: Gpu,
    bits: int,
    m: int,
    experts: int,
    out_features: int,
    in_features: int,
    group_size: int,
    codebook: bool = False,
    pairs: bool = False,
) -> Config:
    """A configuration for m rows that are routed to stacked experts, sorted, or in pairs, each for itself; as `rule`.

    Blocks of sorted rows have room for twice the rows of an expert, if all had as many, so that most experts are one
    block; where a product of so many rows would dequantize one weight, all of them are. The programs of all experts run
    at once, so none share K.
    """
    active = min(m, experts)
    rows = 1 if pairs else 2 * -(-m // active)
    if pairs and group_size < 64 and gpu.backend == "cuda":
        rows = 2  # no tensor cores: an expert's addresses take registers, of which groups so small leave none
    config = rule(gpu, bits, rows, out_features * active, in_features, group_size, codebook)
    if config.family == "many_rows" and config.block_n == 128 and config.block_m > 32 and gpu.tensor_memory:
        config = replace(config, registers=255)  # the addresses again: at 128, which let two programs fit, ptxas spills
    return replace(config, programs_k=1)


def _one_row(gpu: Gpu, bits: int, group_size: int) -> Config:
    # A warp processes 8 tiles of a row: 4096 codes of 3 bits, 1024 of 4. Four rows of 2 bits spill in small groups.
    warps, rows = (1, 2) if bits == 3 else (4, 2) if bits == 2 and group_size < 64 else (4, 4)
    registers = None if group_size >= 64 else 255
    return Config("one_row", rows, 1, 8 * warps, warps=warps, registers=registers, pdl=gpu.pdl)


def _few_rows(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int, codebook: bool) -> Config:
    block_m, warps = power(m, 8) if bits in (4, 8) else 8, 8
    # 64 rows read x half as often: if K fills whole tiles, and programs suffice: two for each multiprocessor, which fit
    # up to 8 rows of x, or else six warps.
    most = 0 if codebook else {4: 16, 8: 8}.get(bits, 0)  # codebooks of 64 rows spill
    enough = 2 * BUSY * gpu.processors if block_m == 8 else 6 * gpu.processors / warps
    # Of groups of 32, 64 rows spill with triton 3.6 for more than 8 rows of x.
    fits = block_m == 8 or group_size >= 64
    whole = fits and k % (warps * TILE[bits]) == 0 and -(-n // 64) >= enough
    rows = 64 if whole and block_m <= most else 16 if bits == 3 else 32
    stage = warps * (rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2)
    while stage > gpu.shared * 3 // 4:
        warps, stage = warps // 2, stage // 2
    # Half of the memory, if that holds two buffers, so that two programs fit.
    share = gpu.shared // 2 if block_m == 8 and 2 * stage <= gpu.shared // 2 else gpu.shared * 3 // 4
    stages = max(1, min(4, 1 + share // stage))
    # In these cases ptxas spilled registers to raise occupancy.
    tight = group_size < 64 or gpu.target == "cuda:120" and rows == 64
    registers = None if bits == 4 and not tight else 255
    return Config("few_rows", rows, block_m, warps=warps, stages=stages, registers=registers, pdl=gpu.pdl)


def _many_rows(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int, widest: int, tall: bool) -> Config:
    whole = k % TILE[bits] == 0 and gpu.backend != "hip"
    block_m = min(widest, power(m, 32)) if whole else min(widest, 64)
    columns, busy = -(-m // block_m), BUSY * gpu.processors
    rows = 128 if whole and bits == 4 and tall and -(-n // 128) * columns * _splits(bits, k) >= busy else 64
    programs, programs_k = -(-n // rows) * columns, 1
    while whole and programs_k < _splits(bits, k) and programs * programs_k < busy:
        programs_k *= 2
    stage = rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2
    # Three stages use two buffers on sm_80 and sm_89: with 3 bits they just fit, and with one buffer ptxas spills.
    stages = max(3 if gpu.backend == "cuda" else 1, min(4, gpu.shared * 7 // 8 // stage))
    run = run_length(bits, group_size, k)[1]
    prescale = run * 32 < block_m
    if gpu.backend == "hip" and TILE[bits] > 32 * MOST_DOTS * dot_length(bits, run, prescale):
        stages = 1
    registers = 255 if bits in (2, 8) else None
    warps = 8 if rows == 128 else 4
    return Config("many_rows", rows, block_m, 1, programs_k, warps, stages, prescale, registers, gpu.pdl)


def _splits(bits: int, k: int) -> int:
    """The most programs that may share K: a power of two."""
    return max(1, min(MOST_SPLIT, 1 << max(0, (k // TILE[bits] // 4).bit_length() - 1)))
