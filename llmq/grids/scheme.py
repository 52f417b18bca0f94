"""What a quantized weight is (Scheme), and how its input is rounded when the model runs (Activations)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.errors import LlmqError
from llmq.validate import check_choice, check_keys, check_types, made

GRIDS = ("int", "fp8", "nf4")
RANGES = ("minmax", "mse", "weighted", "percentile", "kl", "aciq")
NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Activations:
    """How the input of a weight is rounded when the model runs: to 8 bits, on the same kind of grid as the weight.

    dynamic: one scale per token, found as the model runs; otherwise one scale for the whole tensor, found on
    calibration data by `range`.
    """

    dynamic: bool = True
    range: str = "minmax"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("activations: range", self.range, [r for r in RANGES if r != "weighted"])

    def __str__(self) -> str:
        return "dynamic" if self.dynamic else f"static ({self.range})"


@dataclass(frozen=True)
class Scheme:
    """The grid of a weight [out, in].

    grid: 'int': w ≈ (code − zero) · scale, codes in [−2^(bits−1), 2^(bits−1) − 1]; 'fp8': float8_e4m3fn · scale;
    'nf4': one of 16 normal quantiles · the largest magnitude of its block. bits: 2…8 (float: 8, nf4: 4). group_size:
    input columns that share a scale, for nf4 elements of the flattened weight; None is one scale per output channel.
    symmetric: zero is 0 and not stored. double_quant: nf4 only, the block maxima are stored in 8 bits. activations: how
    the weight's input is rounded when the model runs; None leaves it alone.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    grid: str = "int"
    double_quant: bool = False
    activations: Activations | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("grid", self.grid, GRIDS)
        if not 2 <= self.bits <= 8:
            raise LlmqError(f"bits must be a whole number from 2 to 8, not {self.bits!r}")
        if self.group_size is not None and self.group_size < 2:
            raise LlmqError(f"group size must be a whole number from 2 up, or 'channel', not {self.group_size!r}")
        plain = self.group_size is None and self.symmetric and self.bits == 8
        if self.grid == "fp8" and not plain:
            raise LlmqError("grid 'fp8' is 8 bits, symmetric, group size 'channel'")
        if self.activations is not None and (self.grid == "nf4" or not plain):
            raise LlmqError(
                f"activations are rounded to 8 bits where weights are 8 bits, symmetric, group size 'channel': {self} "
                "is not: --activations none leaves them alone, or choose --bits 8 --group-size channel"
            )
        if self.double_quant and self.grid != "nf4":
            raise LlmqError("double_quant is for grid 'nf4' only")
        if self.grid == "nf4" and (self.bits != 4 or not self.symmetric or self.group_size not in NF4_BLOCKS):
            raise LlmqError(
                f"grid 'nf4' is 4 bits, symmetric, in blocks (group size) of {', '.join(map(str, NF4_BLOCKS))}"
            )

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        if self.grid == "nf4":
            return f"nf4 {group}{' double-quantized' if self.double_quant else ''}"
        name = "fp8 channel" if self.grid == "fp8" else f"{self.bits}-bit {group}"
        if self.grid == "int":
            name += " symmetric" if self.symmetric else " asymmetric"
        return name + (f", {self.activations} activations" if self.activations else "")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """How many groups a row of `width` inputs has; the group size must divide the width."""
        return 1 if self.group_size is None else width // self.group_size


def changed_scheme(data: Any, base: Scheme, where: str) -> Scheme:
    """The base scheme with the keys of a mapping changed. Raises LlmqError saying where."""
    values = check_keys(data, Scheme, where)
    if values.get("group_size") == "channel":
        values["group_size"] = None
    if values.get("grid", "nf4") != "nf4":
        values.setdefault("double_quant", False)
    if "activations" in values:
        values["activations"] = _activations(values["activations"], f"{where}: activations")
    return made(lambda: dataclasses.replace(base, **values), where)


def _activations(data: Any, where: str) -> Activations | None:
    """'dynamic', 'static', a mapping, or None or 'none'."""
    if data in (None, "none"):
        return None
    if isinstance(data, Mapping):
        fields = check_keys(data, Activations, where)
        return made(lambda: Activations(**fields), where)
    check_choice(where, data, ("dynamic", "static", "none"))
    return Activations(dynamic=data == "dynamic")
