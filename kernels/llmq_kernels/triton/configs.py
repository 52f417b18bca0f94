"""Launch configurations: which kernel runs a product, in what tile, on which GPU.

`choose` looks into the user's table, then the shipped one, then asks `rule`, which knows only counts: multiprocessors,
warps, shared memory. No kernel is ever timed behind a user's back; `llmq_kernels.tune` writes the user's table.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from math import gcd
from pathlib import Path
from typing import Any, Literal

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
    "hip:gfx942"), empty for all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


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
    splitk); split: programs that share K; prescale: scales multiply codes rather than sums (gemm).
    """

    family: Family
    block_n: int = 0
    block_m: int = 0
    parts: int = 1
    split: int = 1
    warps: int = 4
    stages: int = 1
    prescale: bool = False


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
    """GROUP and RUN of the kernels: codes in a group, 0 for one group; slices that surely share one, 0 for all."""
    if group_size >= in_features:
        return 0, 0
    return group_size, gcd(group_size, TILE[bits]) // 32


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

    Few rows: at least six warps for each multiprocessor, each with some tiles on their way, from as large programs as
    allow that. Many rows: the weight is dequantized once where that costs less than what a fused kernel loses
    to the vendor's.
    """
    tiles = -(-in_features // TILE[bits])
    if m <= 2 and (bits == 8 or not gpu.wide):
        return _gemv(bits, m, out_features, tiles)
    if m <= (32 if bits in (4, 8) else 16):
        return _splitk(gpu, bits, m, out_features, tiles)
    if m <= (512 if gpu.target in ("cuda:89", "cuda:90") else 256):
        return _gemm(gpu, bits, m, out_features, in_features, group_size)
    return Config("dense")


def _gemv(bits: int, m: int, n: int, tiles: int) -> Config:
    # A warp takes 8 tiles of a row at a time; of the widths that leave fewest lanes idle, the widest.
    warps = min((8, 4, 2, 1), key=lambda width: (-(-tiles // (8 * width)) * width, -width))
    return Config("gemv", block_n=4 if m == 1 and bits != 3 else 2, block_m=power(m, 1), parts=8 * warps, warps=warps)


def _splitk(gpu: Gpu, bits: int, m: int, n: int, tiles: int) -> Config:
    block_m = power(m, 8)
    columns = -(-m // block_m)
    most = power(tiles + 1, 2) // 2
    wanted = 6 * gpu.processors
    # Accumulators of a warp: rows · block_m, twice. Beyond these sizes the kernels spill (scripts/compile_kernels.py).
    largest = (1024 if bits in (4, 8) else 512) // block_m
    fitting = [(rows, min(parts, most)) for rows in (64, 32, 16) for parts in (4, 8) if rows <= largest]
    enough = (fit for fit in fitting if -(-n // fit[0]) * columns * fit[1] >= wanted)
    rows, parts = next(enough, (min(32, largest), min(8, most)))
    programs = -(-n // rows) * columns
    split = 1
    while programs * parts * split < wanted and 2 * split * parts * 4 <= tiles and split < 8:
        split *= 2
    stage = parts * (rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2)
    while parts > 1 and stage > gpu.shared * 3 // 4:
        parts, stage = parts // 2, stage // 2
    stages = max(1, min(4, 1 + gpu.shared * 3 // 4 // stage))
    return Config("splitk", rows, block_m, parts, split, warps=parts, stages=stages)


def _gemm(gpu: Gpu, bits: int, m: int, n: int, k: int, group_size: int) -> Config:
    tiles = -(-k // TILE[bits])
    block_m = 32 if m <= 32 else 64 if m <= 64 or bits in (2, 3) else 128
    # 8 bits in 128 rows spill for other tensor cores than a warp-group's; 2 and 3 bits spill everywhere.
    large = bits == 4 or (bits == 8 and gpu.target in ("cuda:90", "cuda:100", "cuda:103"))
    rows = 128 if large and -(-n // 128) * -(-m // block_m) * 2 >= gpu.processors else 64
    programs = -(-n // rows) * -(-m // block_m)
    split = 1
    while programs * split * 2 <= gpu.processors and 2 * split * 4 <= tiles and split < 8:
        split *= 2
    stage = rows * WORDS[bits] * 2 + TILE[bits] * block_m * 2
    stages = max(1, min(4, gpu.shared * 7 // 8 // stage))
    prescale = group_size < k and run_length(bits, group_size, k)[1] * 32 < block_m
    return Config("gemm", rows, block_m, 1, split, 8 if rows == 128 else 4, stages, prescale)


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
    found = read_table(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    if user.is_file():
        found |= read_table(user.read_text(encoding="utf-8"))
    return found


def read_table(text: str) -> dict[str, Config]:
    """A table from its JSON. Raises ValueError when it is none."""
    try:
        return {name: Config(**entry["config"]) for name, entry in json.loads(text)["measured"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a table of launch configurations: {error}; delete it, or run llmq tune again") from error


def entry(config: Config, microseconds: float) -> dict[str, Any]:
    """One measured configuration as it stands in a table."""
    return {"config": asdict(config), "microseconds": round(microseconds, 2)}


SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (1024, 2048), (96, 160))


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
        name = (
            f"{self.config.family} {self.bits} bits group {group or 'all'} {self.dtype}{' zero' if self.zero else ''} "
            f"{self.config.block_n}x{self.config.block_m}{flags} warps {self.config.warps} stages {self.config.stages}"
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
        )


def choices(family: Family) -> Iterator[Choice]:
    """What the rule reaches of a family, for usual shapes: every dtype, with and without zero points."""
    for gpu in KNOWN:
        seen = set()
        for bits in TILE:
            for group_size in (128, 32, 1 << 30):
                for n, k in SHAPES:
                    for m in BUCKETS:
                        config = rule(gpu, bits, m, n, k, group_size)
                        even = k % (TILE[bits] * config.parts) == 0
                        if config.family != family or (bits, group_size, even, config) in seen:
                            continue
                        seen.add((bits, group_size, even, config))
                        for dtype in ("bf16", "fp16"):
                            for zero in (False, True):
                                yield Choice(gpu, bits, group_size, k, zero, dtype, config)
