"""Measured launch configurations: the user's table, then the shipped table, then the rule.

Kernels are never timed automatically; `llmq_kernels.tune` writes the user's table.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import torch
import triton

from llmq_kernels.triton.config import PLAIN, Config, Family, Kind
from llmq_kernels.triton.gpu import Gpu
from llmq_kernels.triton.rule import routed_rule, rule

FLAGS = ("prescale", "pdl")
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def choose(
    gpu: Gpu,
    bits: int,
    m: int,
    out_features: int,
    in_features: int,
    group_size: int,
    zeros: bool,
    dtype: torch.dtype,
    kind: Kind = PLAIN,
) -> Config:
    """How to run x [m, in] · Wᵀ: measured for this shape by the user or before shipping, else by the rule.

    zeros: whether the weight has zero points; dtype: x's; kind: of experts, m rows are routed to them. What another
    version of Triton was measured with is left out.
    """
    measured = table(gpu.name)
    rows = bucket(m, kind)
    if measured and rows:
        found = measured.get(key(bits, rows, out_features, in_features, group_size, zeros, dtype, kind))
        if found is not None:
            return found
    return ruled(gpu, bits, m, out_features, in_features, group_size, kind)


def ruled(
    gpu: Gpu, bits: int, m: int, out_features: int, in_features: int, group_size: int, kind: Kind = PLAIN
) -> Config:
    """What the rule chooses where nothing was measured; arguments as of `choose`."""
    sizes, codebook = (out_features, in_features, group_size), bool(kind.codebook)
    if kind.experts:
        return routed_rule(gpu, bits, m, kind.experts, *sizes, codebook, kind.pairs)
    return rule(gpu, bits, m, *sizes, codebook)


def bucket(m: int, kind: Kind = PLAIN) -> int:
    """The row count under which a table keeps measurements of m rows; 0 beyond the last, which no table has.

    Of experts, which share the rows, there is no last.
    """
    if kind.experts:
        return 1 << (m - 1).bit_length()
    return next((size for size in BUCKETS if m <= size), 0)


def key(
    bits: int,
    rows: int,
    out_features: int,
    in_features: int,
    group_size: int,
    zeros: bool,
    dtype: torch.dtype,
    kind: Kind = PLAIN,
) -> str:
    """The key of a measured configuration in a table: all that decides which is fastest, except for the GPU."""
    groups = f"groups of {min(group_size, in_features)}{' with zero points' if zeros else ''}"
    version = ".".join(triton.__version__.split(".")[:2])
    of = str(dtype).removeprefix("torch.")
    return f"{bits} bits, {rows} x {in_features} to {out_features}, {groups}{kind}, {of}, triton {version}"


def user_table(name: str) -> Path:
    """The file of `llmq_kernels.tune`'s measurements on a GPU of that name."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "llmq" / "tuned" / file_name(name)


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


@functools.cache
def table(name: str) -> dict[str, Config]:
    """All measurements on a GPU of that name: the shipped ones, overridden by the user's own."""
    shipped = resources.files("llmq_kernels") / "tuned" / file_name(name)
    user = user_table(name)
    found = read_table(shipped) if shipped.is_file() else {}
    if user.is_file():
        found |= read_table(user)
    return found


def read_table(file: Path | Traversable) -> dict[str, Config]:
    """A table from its JSON. Raises ValueError if it is invalid, or has a configuration that cannot be launched."""
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
        found = {name: Config(**entry["config"]) for name, entry in measured.items()}
        for name, config in found.items():
            check(name, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a table of launch configurations ({error}); delete it and run llmq tune"
        ) from error
    return found


def check(name: str, config: Config) -> None:
    """Raise ValueError for a configuration that cannot be launched."""
    numbers = {field: value for field, value in asdict(config).items() if field not in ("family", *FLAGS)}
    if config.family not in get_args(Family):
        raise ValueError(f"{name}: family {config.family!r}")
    for field in FLAGS:
        if not isinstance(getattr(config, field), bool):
            raise ValueError(f"{name}: {field} {getattr(config, field)!r}")
    for field, value in numbers.items():
        if not (isinstance(value, int) and 0 <= value <= 1024 or field == "registers" and value is None):
            raise ValueError(f"{name}: {field} is {value!r}")
    if config.family == "dense":
        return
    # Sizes of Triton's ranges, and numbers of warps, are powers of two.
    for field in ("block_n", "block_m", "warps"):
        if numbers[field] < 1 or numbers[field] & (numbers[field] - 1):
            raise ValueError(f"{name}: {field} is {numbers[field]}, not a power of two")
    if min(config.tiles, config.programs_k, config.stages) < 1:
        raise ValueError(f"{name}: tiles {config.tiles}, programs_k {config.programs_k}, stages {config.stages}")


def entry(config: Config, microseconds: float) -> dict[str, Any]:
    """One measured configuration as an entry of a table."""
    return {"config": asdict(config), "microseconds": round(microseconds, 2)}
