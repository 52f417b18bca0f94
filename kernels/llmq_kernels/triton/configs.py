"""Launch configurations: which kernel runs a product, in what tile, on which GPU.

`choose` looks into the user's table, then the shipped one, then asks `rule`, which knows only counts: multiprocessors,
warps, shared memory. No kernel is ever timed behind a user's back; `llmq_kernels.tune` writes the user's table.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from math import gcd
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Family = Literal["gemv", "splitk", "gemm", "dense"]
TILE = {2: 256, 3: 512, 4: 128, 8: 64}
WORDS = {2: 32, 3: 96, 4: 32, 8: 32}
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its machine code depends on: what scripts/compile_kernels.py compiles.

    signature: argument → triton type ("*bf16", "i32"), constexprs left out; constexprs: values of the rest (None for a
    tensor that is not there); divisible: arguments that are multiples of 16 at every launch of this variant (pointers,
    sizes), as triton's own launcher finds out by looking at them; targets: the GPUs it is for ("cuda:90",
    "hip:gfx942"), empty for all; maxnreg: as
    `Config.registers`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    maxnreg: int | None = None


@dataclass(frozen=True)
class Gpu:
    """What the rule knows of a GPU. target: as `Variant.targets`; shared: bytes of shared memory for one program."""

    name: str
    target: str
    processors: int
    shared: int

    @property
    def mode(self) -> str:
        """How kernels unpack (`unpack`): in PTX, plainly, or as the interpreter, whose dots know no bfloat16, can."""
        return {"cuda": "ptx", "hip": "plain"}.get(self.target.partition(":")[0], "interpreted")

    @property
    def wide(self) -> bool:
        """Memory so fast that unpacking holds back a kernel without tensor cores: the data-center cards."""
        return self.target in ("cuda:80", "cuda:90", "cuda:100", "cuda:103")


KNOWN = (
    Gpu("NVIDIA A100-SXM4-80GB", "cuda:80", 108, 166912),
    Gpu("NVIDIA GeForce RTX 4090", "cuda:89", 128, 101376),
    Gpu("NVIDIA H100 80GB HBM3", "cuda:90", 132, 232448),
    Gpu("NVIDIA B200", "cuda:100", 148, 232448),
    Gpu("AMD Instinct MI300X", "hip:gfx942", 304, 65536),
)
INTERPRETER = Gpu("interpreter", "cpu", 4, 65536)


@dataclass(frozen=True)
class Config:
    """One way to run a product.

    block_n, block_m: rows of the weight and of x in a program; parts: tiles side by side along K in a program (gemv,
    splitk); split: programs that share K; prescale: scales multiply codes rather than sums (gemm). registers: how many
    a thread may use on NVIDIA. None: as few as ptxas likes, which at times spills so that more programs fit.
    """

    family: Family
    block_n: int = 0
    block_m: int = 0
    parts: int = 1
    split: int = 1
    warps: int = 4
    stages: int = 1
    prescale: bool = False
    registers: int | None = None

    def options(self, mode: str) -> dict[str, int]:
        """What Triton is told beside the kernel's arguments."""
        limit = {"maxnreg": self.registers} if self.registers and mode == "ptx" else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device; tensors elsewhere are the interpreter's."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        target = "hip:" + str(found.gcnArchName).partition(":")[0]
    else:
        target = f"cuda:{found.major * 10 + found.minor}"
    shared = int(getattr(found, "shared_memory_per_block_optin", 65536))
    return Gpu(str(found.name), target, int(found.multi_processor_count), shared)


def run_length(bits: int, group_size: int, in_features: int) -> tuple[int, int]:
    """GROUP and RUN of the kernels: codes in a group; slices that surely share one.

    A row with one scale runs as groups of 128 do, all of them the first: the same machine code.
    """
    group = 128 if group_size >= in_features else group_size
    return group, gcd(group, TILE[bits]) // 32


def bucket(m: int) -> int:
    """The row count under which measurements of m rows are kept."""
    return next((size for size in BUCKETS if m <= size), BUCKETS[-1])


def choose(gpu: Gpu, bits: int, m: int, out_features: int, in_features: int, group_size: int) -> Config:
    """How to run x [m, in] · Wᵀ: as measured for this shape, by the user or before shipping, or by the rule."""
    found = table(gpu.name).get(key(bits, bucket(m), out_features, in_features, group_size))
    return found or rule(gpu, bits, m, out_features, in_features, group_size)


@functools.lru_cache(maxsize=4096)
def rule(gpu: Gpu, bits: int, m: int, out_features: int, in_features: int, group_size: int) -> Config:
    """A configuration for any GPU, by counting; nothing in it is measured.

    One row where unpacking is cheap enough: no tensor cores. Few rows: K divided among eight warps of a program. More:
    a fused product, up to four blocks of rows. Beyond, the weight is dequantized once, which then costs less than what
    a fused kernel loses to the vendor's.

    It reaches few configurations on purpose, so that scripts/compile_kernels.py can compile every one and see that none
    spills: K that does not fill the tiles has only the smaller ones, and AMD one for each of two kernels.
    """
    if m == 1 and (bits == 8 or not gpu.wide):
        return _gemv(bits)
    # With more than four groups a tile, a fused product of many rows spills. 2 and 3 bits are so many dots a tile that
    # tensor memory may not hold their sums: Triton then compiles to a trap.
    short = TILE[bits] > 4 * 32 * run_length(bits, group_size, in_features)[1]
    refused = gpu.mode != "plain" and (short or bits in (2, 3) and gpu.target in ("cuda:100", "cuda:103"))
    few = 32 if refused or bits == 4 and group_size >= 64 else 16 if bits in (4, 8) else 8
    if m <= few and gpu.mode != "plain":
        return _splitk(gpu, bits, m, out_features, in_features, group_size)
    if refused:
        return Config("dense")
    widest = 32 if bits in (2, 3) or gpu.mode == "plain" else 128 if bits == 4 and gpu.target == "cuda:90" else 64
    if m <= 4 * widest:
        return _gemm(gpu, bits, m, out_features, in_features, group_size, widest)
    return Config("dense")


def _gemv(bits: int) -> Config:
    # A warp takes 8 tiles of a row at a time: 4096 codes of 3 bits, 1024 of 4.
    warps = 1 if bits == 3 else 4
    return Config("gemv", block_n=2 if bits == 3 else 4, block_m=1, parts=8 * warps, warps=warps)


def _splitk(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int) -> Config:
    block_m, parts = power(m, 8) if bits in (4, 8) else 8, 8
    # 64 rows read x half as often: where K is whole, six warps for each multiprocessor remain, and registers suffice.
    whole = k % (parts * TILE[bits]) == 0 and -(-n // 64) * parts >= 6 * gpu.processors
    rows = 64 if whole and block_m <= {4: 16, 8: 8}.get(bits, 0) else 16 if bits == 3 else 32
    stage = parts * (rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2)
    while stage > gpu.shared * 3 // 4:
        parts, stage = parts // 2, stage // 2
    stages = max(1, min(4, 1 + gpu.shared * 3 // 4 // stage))
    # Where ptxas was seen to spill for the sake of occupancy.
    registers = None if bits == 4 and group_size >= 64 else 255
    return Config("splitk", rows, block_m, parts, warps=parts, stages=stages, registers=registers)


def _gemm(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int, widest: int) -> Config:
    whole = k % TILE[bits] == 0 and gpu.mode != "plain"
    block_m = min(widest, power(m, 32 if widest == 32 else 64)) if whole else min(widest, 64)
    rows = 128 if whole and bits == 4 and -(-n // 128) * -(-m // block_m) * 2 >= gpu.processors else 64
    programs, split = -(-n // rows) * -(-m // block_m), 1
    while whole and rows == 64 and programs * split * 2 <= gpu.processors and 8 * split * TILE[bits] <= k and split < 8:
        split *= 2
    stage = rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2
    # Three are two buffers on sm_80 and sm_89: those of 3 bits fit just so, and with one ptxas spills.
    stages = max(3 if gpu.mode == "ptx" else 1, min(4, gpu.shared * 7 // 8 // stage))
    prescale = run_length(bits, group_size, k)[1] * 32 < block_m
    registers = 255 if bits in (2, 8) else None
    return Config("gemm", rows, block_m, 1, split, 8 if rows == 128 else 4, stages, prescale, registers)


def power(value: int, least: int) -> int:
    """The smallest power of two that is no smaller than either."""
    return max(least, 1 << (value - 1).bit_length())


def key(bits: int, rows: int, out_features: int, in_features: int, group_size: int) -> str:
    """Under what a measured configuration is kept."""
    return f"{bits} bits, {rows} x {in_features} to {out_features}, groups of {min(group_size, in_features)}"


def user_table(name: str) -> Path:
    """Where `llmq_kernels.tune` keeps what it measured on a GPU of that name."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "llmq" / "tuned" / file_name(name)


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


@functools.cache
def table(name: str) -> dict[str, Config]:
    """Everything measured on a GPU of that name: what is shipped, and over it the user's own."""
    shipped = resources.files("llmq_kernels") / "tuned" / file_name(name)
    user = user_table(name)
    found = read_table(shipped) if shipped.is_file() else {}
    if user.is_file():
        found |= read_table(user)
    return found


def read_table(file: Path | Traversable) -> dict[str, Config]:
    """A table from its JSON. Raises ValueError when it is none, or holds what no kernel can be launched with."""
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
        found = {name: Config(**entry["config"]) for name, entry in measured.items()}
        for name, config in found.items():
            check(name, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no table of launch configurations ({error}); delete it and run llmq tune") from error
    return found


def check(name: str, config: Config) -> None:
    """Raise ValueError for a configuration with which no kernel can be launched."""
    numbers = {field: value for field, value in asdict(config).items() if field not in ("family", "prescale")}
    if config.family not in get_args(Family) or not isinstance(config.prescale, bool):
        raise ValueError(f"{name}: family {config.family!r}, prescale {config.prescale!r}")
    for field, value in numbers.items():
        if not (isinstance(value, int) and 0 <= value <= 1024 or field == "registers" and value is None):
            raise ValueError(f"{name}: {field} is {value!r}")
    if config.family == "dense":
        return
    # What Triton makes ranges of, and warps, are powers of two.
    for field in ("block_n", "block_m", "warps"):
        if numbers[field] < 1 or numbers[field] & (numbers[field] - 1):
            raise ValueError(f"{name}: {field} is {numbers[field]}, no power of two")
    if min(config.parts, config.split, config.stages) < 1:
        raise ValueError(f"{name}: parts {config.parts}, split {config.split}, stages {config.stages}")


def entry(config: Config, microseconds: float) -> dict[str, Any]:
    """One measured configuration as it stands in a table."""
    return {"config": asdict(config), "microseconds": round(microseconds, 2)}


# Rows and columns of usual weights: narrow and wide, K whole in tiles, in some of them, or in none.
SHAPES = tuple(itertools.product((96, 1024, 4096, 8192, 28672), (160, 2048, 4096, 11008, 14336)))


@dataclass(frozen=True)
class Choice:
    """A configuration that the rule reaches on a known GPU, with what else the kernel's machine code depends on."""

    gpu: Gpu
    bits: int
    group_size: int
    in_features: int
    zero: bool
    dtype: str
    config: Config

    def variant(self, kernel: Any, constexprs: Mapping[str, Any], parts: bool = False) -> Variant:
        """It, as a Variant of a kernel that has its own constexprs beside the common ones. parts: y is float32."""
        tensor = f"*{self.dtype}"
        signature = {"x": tensor, "packed": "*i16", "scale": tensor, "zero": "*i8", "bias": tensor, "y": tensor}
        signature |= dict.fromkeys(("M", "N", "K", "tiles", "groups"), "i32")
        if parts:
            signature["y"] = "*fp32"
        absent = {} if self.zero else {"zero": signature.pop("zero") and None}
        group, run = run_length(self.bits, self.group_size, self.in_features)
        common = {"BITS": self.bits, "GROUP": group, "RUN": run, "MODE": self.gpu.mode}
        blocks = {"BLOCK_M": self.config.block_m, "BLOCK_N": self.config.block_n}
        flags = "".join(f" {name.lower()} {value}" for name, value in constexprs.items())
        limit = self.config.options(self.gpu.mode).get("maxnreg")
        name = (
            f"{self.config.family} {self.bits} bits group {group} {self.dtype}{' zero' if self.zero else ''} "
            f"{self.config.block_n}x{self.config.block_m}{flags} warps {self.config.warps} stages {self.config.stages}"
            f"{' free' if limit else ''}"
        )
        wide = ("x", "packed", "scale", "zero", "bias", "y", "N", "K")
        return Variant(
            name,
            kernel,
            signature,
            absent | common | blocks | dict(constexprs),
            self.config.warps,
            self.config.stages,
            tuple(argument for argument in wide if argument in signature),
            (self.gpu.target,),
            limit,
        )


def choices(family: Family) -> Iterator[Choice]:
    """What the rule reaches of a family, for usual shapes: every dtype, with and without zero points.

    All numbers of parts of K count as two: they differ in one constant of an address.
    """
    for gpu in KNOWN:
        seen = set()
        for bits, group_size, (n, k), m in itertools.product(TILE, (128, 32), SHAPES, BUCKETS):
            config = rule(gpu, bits, m, n, k, group_size)
            config = replace(config, split=min(config.split, 2))
            # What EVEN_K of the kernels depends on; gemv has none.
            whole = family != "gemv" and k % (TILE[bits] * config.parts) == 0
            if config.family != family or (bits, group_size, whole, config) in seen:
                continue
            seen.add((bits, group_size, whole, config))
            for dtype, zero in itertools.product(("bf16", "fp16"), (False, True)):
                yield Choice(gpu, bits, group_size, k, zero, dtype, config)
