"""A launch configuration of the integer kernels, and the constants that follow from a weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

from llmq_kernels.int_linear.planes import TILE

Family = Literal["one_row", "few_rows", "many_rows", "dense"]


@dataclass(frozen=True)
class Config:
    """One way to run a product: a family of kernels, or the dense product of the dequantized weight.

    block_n, block_m: rows of the weight and of x per program; tiles: tiles of a row that a program processes at once
    (one_row; in few_rows each warp processes one); programs_k: programs that share K; prescale: scales multiply codes
    instead of sums (many_rows); registers: the limit per thread on NVIDIA, None for ptxas' own choice, which sometimes
    spills so that more programs fit; pdl: programmatic dependent launch, from Hopper on: programs start while the
    kernel before them still runs, and wait for it before they touch memory.
    """

    family: Family
    block_n: int = 0
    block_m: int = 0
    tiles: int = 1
    programs_k: int = 1
    warps: int = 4
    stages: int = 1
    prescale: bool = False
    registers: int | None = None
    pdl: bool = False

    def options(self, backend: str) -> dict[str, Any]:
        """Triton's launch options besides the kernel's arguments."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.registers and backend == "cuda":
            options["maxnreg"] = self.registers
        if self.pdl and backend == "cuda":
            options["launch_pdl"] = True
        return options


@dataclass(frozen=True)
class Kind:
    """What else than sizes, zero points and dtypes decides how a weight is multiplied.

    codebook: 4-bit codes count the entries of one codebook for "all" rows, or of one for each of the "rows"; "" for
    integers. experts: how many weights are stacked, 0 for one weight; pairs: rows are routed to them in pairs, each for
    itself, not sorted.
    """

    codebook: Literal["", "all", "rows"] = ""
    experts: int = 0
    pairs: bool = False

    def __str__(self) -> str:
        """Behind the sizes in the key of a table."""
        codes = {"": "", "all": ", a codebook", "rows": ", codebooks of rows"}[self.codebook]
        return codes + (f", {self.experts} experts{' in pairs' if self.pairs else ''}" if self.experts else "")


PLAIN = Kind()


def run_length(bits: int, group_size: int, in_features: int) -> tuple[int, int]:
    """GROUP and RUN of the kernels: codes per group; consecutive slices that always share a group.

    A row with one scale uses the machine code for groups of 128, with every group index 0.
    """
    group = 128 if group_size >= in_features else group_size
    return group, gcd(group, TILE[bits]) // 32


def dot_length(bits: int, run: int, prescale: bool) -> int:
    """DOT of many_rows: slices of a tile in one dot. Without prescale they share a group."""
    return min(4, TILE[bits] // 32 if prescale else run)


def power(value: int, least: int) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << (value - 1).bit_length())
