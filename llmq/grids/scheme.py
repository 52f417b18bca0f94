"""The scheme of a quantized weight (Scheme), and the rounding of its input when the model runs (Activations)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from llmq.errors import LlmqError
from llmq.grids.table import GRIDS, HALF_SCALES, INPUT_GRIDS, OWN, POWER_SCALES, RANGES, Grid, Inputs, find
from llmq.validate import check_choice, check_keys, check_types, made

SCALES = {"free": GRIDS, "pow2": POWER_SCALES, "float16": HALF_SCALES}
TOLD_SCALES = {"pow2": "that are powers of two (pow2)", "float16": "in float16"}
PACKINGS = ("standard", "llmq")


@dataclass(frozen=True)
class Activations:
    """The rounding of a weight's input when the model runs, as the row of the weight's grid has it.

    dynamic: scales are computed as the model runs, for each token or group of its inputs; otherwise one scale for the
    whole tensor, or for the scales of all groups, is found on calibration data by `range`. grid: whose values inputs
    take, if not those that the row has first.
    """

    dynamic: bool = True
    range: str = "minmax"
    grid: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("activations: range", self.range, [r for r in RANGES if r != "weighted"])
        if self.grid:
            check_choice("activations: grid", self.grid, INPUT_GRIDS)

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else f"static ({self.range})"
        return f"{kind} {self.grid}" if self.grid else kind

    @property
    def word(self) -> str:
        """What --activations takes for it, but for the range."""
        return self.grid or ("dynamic" if self.dynamic else "static")


@dataclass(frozen=True)
class Scheme:
    """How a weight [out, in] is quantized: w ≈ (point − zero) · scale, with points of a grid.

    grid: a row of `grids.table`, which has its limits. bits: of a code. group_size: input columns that share a scale
    (nf4: elements of the flattened weight); None is one scale per output channel. symmetric: zero is 0 and not stored.
    double_quant: the scales are quantized to 8 bits too. activations: the rounding of the weight's input when the model
    runs; None is no rounding. scales: 'free'; 'pow2' for powers of two, those of inputs too where they are static; or
    'float16' for what float16 holds, in a model of any dtype. packing: 'standard', or 'llmq' for a folder that
    only llmq reads: the fewest bits, and experts of any kind. level_rows: how many rows, from the first on, share the
    levels of a grid that learns them; from two on, every row has a scale.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    grid: str = "int"
    double_quant: bool = False
    activations: Activations | None = None
    scales: str = "free"
    packing: str = "standard"
    level_rows: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        grid = find(self.grid)
        lowest = min(2, *grid.bits)
        if not lowest <= self.bits <= 8:
            raise LlmqError(f"bits must be a whole number from {lowest} to 8, not {self.bits!r}")
        if self.group_size is not None and self.group_size < 2:
            raise LlmqError(f"group size must be a whole number from 2 up, or 'channel', not {self.group_size!r}")
        refusal = grid.refusal(self.bits, self.group_size, self.symmetric)
        check_choice("scales", self.scales, [*SCALES])
        if grid.name not in SCALES[self.scales]:
            having = ", ".join(map(repr, SCALES[self.scales]))
            raise LlmqError(f"scales {TOLD_SCALES[self.scales]} are for grid {having} only, not {self.grid!r}")
        check_choice("packing", self.packing, PACKINGS)
        if self.packing == "llmq" and not grid.own:
            having = ", ".join(map(repr, OWN))
            raise LlmqError(f"packing 'llmq' is for grid {having} only, not {self.grid!r}")
        if self.level_rows < 1:
            raise LlmqError(f"level_rows must be a whole number from 1 up, not {self.level_rows!r}")
        if self.level_rows > 1 and not grid.learned:
            having = ", ".join(repr(g.name) for g in GRIDS.values() if g.learned)
            raise LlmqError(f"level_rows is for grid {having} only, not {self.grid!r}")
        if self.activations is not None and refusal is None:
            self._check_inputs(self.activations, grid)
        if self.double_quant and not grid.double_quant:
            having = ", ".join(repr(g.name) for g in GRIDS.values() if g.double_quant)
            raise LlmqError(f"double_quant is for grid {having} only")
        if refusal is not None:
            raise LlmqError(refusal)

    def _check_inputs(self, activations: Activations, grid: Grid) -> None:
        """Raises LlmqError if inputs cannot be rounded so beside these weights."""
        inputs = grid.inputs_on(activations.grid)
        plain = self.group_size is None and self.symmetric and self.bits == 8
        if activations.grid and (inputs is None or not self.symmetric or self.bits not in (inputs.beside or grid.bits)):
            having = [g for g in GRIDS.values() if g.inputs_on(activations.grid)]
            listed = " or ".join(f"{g.name!r}" for g in having)
            raise LlmqError(
                f"activations can be rounded to {activations.grid} only beside symmetric 4-bit weights of grid "
                f"{listed}, not {self}: choose --activations none, or such weights"
            )
        if inputs is None or (inputs.group_size is None and not activations.grid and not plain):
            raise LlmqError(
                "activations can be rounded to 8 bits only beside symmetric 8-bit weights with group size 'channel', "
                f"not {self}: choose --activations none, or --bits 8 --group-size channel"
            )
        kind = "dynamic" if activations.dynamic else "static"
        if kind not in inputs.kinds:
            other = activations.grid or inputs.kinds[0]
            raise LlmqError(
                f"activations of grid {grid.name!r} are {inputs.kinds[0]}: choose --activations {other}, or none"
            )
        if not activations.dynamic and activations.range not in inputs.ranges:
            raise LlmqError(
                f"activations: range must be one of {', '.join(inputs.ranges)} with grid {grid.name!r}, not "
                f"{activations.range!r}"
            )

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        name = f"{self.rules.label.format(bits=self.bits)} {group}"
        if self.rules.zero_points:
            name += " symmetric" if self.symmetric else " asymmetric"
        name += " double-quantized" if self.double_quant else ""
        name += "" if self.scales == "free" else f", {self.scales} scales"
        name += f", levels of {self.level_rows} rows" if self.level_rows > 1 else ""
        name += ", packed for llmq" if self.packing == "llmq" else ""
        return name + (f", {self.activations} activations" if self.activations else "")

    @property
    def rules(self) -> Grid:
        """The scheme's grid: its limits, its rounding, its format."""
        return OWN[self.grid] if self.packing == "llmq" else SCALES[self.scales][self.grid]

    @property
    def inputs(self) -> Inputs | None:
        """How the weight's input is rounded, None for not at all."""
        return None if self.activations is None else self.rules.inputs_on(self.activations.grid)

    @property
    def step(self) -> int | None:
        """The width of a weight is a whole number of so many inputs: of groups, and of groups of rounded inputs."""
        rounded = self.inputs and self.inputs.group_size
        return lcm(self.group_size or 1, rounded or 1) if self.group_size or rounded else None

    @property
    def told(self) -> str:
        """The scheme, and what it holds if that is less than it takes on disk: for reports."""
        known, stored = self.rules.information_bits, self.stored_bits
        return str(self) if known is None else f"{self} ({known:.3g} bits of information, stored in {stored:g})"

    @property
    def as_read(self) -> Scheme:
        """The scheme that the written folder has for whoever reads it: scales are as any, codes of a known grid."""
        return replace(self, grid=self.rules.read_as or self.grid, scales="free")

    @property
    def stored_bits(self) -> float:
        """The stored size of a code in bits; it may be a fraction."""
        return float(self.rules.stored_bits or self.bits)

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """The number of groups in a row of `width` inputs; the group size must divide the width."""
        return 1 if self.group_size is None else width // self.group_size


def changed_scheme(data: Any, base: Scheme, where: str) -> Scheme:
    """The base scheme, changed by the keys of a mapping. Raises LlmqError with `where` in its message."""
    values = check_keys(data, Scheme, where)
    if values.get("group_size") == "channel":
        values["group_size"] = None
    grid = values.get("grid", base.grid)
    if isinstance(grid, str):
        # What a grid does not have does not follow to it.
        rules = made(lambda: find(grid), where)
        values = ({} if rules.double_quant else {"double_quant": False}) | values
        values = ({} if rules.name in SCALES.get(base.scales, ()) else {"scales": "free"}) | values
        values = ({} if rules.own else {"packing": "standard"}) | values
        values = ({} if rules.learned else {"level_rows": 1}) | values
    if isinstance(grid, str) and "grid" in values:
        # What a grid has only one of need not be said.
        for key, allowed in (("bits", find(grid).bits), ("group_size", find(grid).group_sizes)):
            if len(allowed) == 1:
                values.setdefault(key, allowed[0])
        if find(grid).minima != base.rules.minima:
            values.setdefault("symmetric", not find(grid).minima)
    if "activations" in values:
        values["activations"] = _activations(values["activations"], f"{where}: activations")
    return made(lambda: replace(base, **values), where)


def _activations(data: Any, where: str) -> Activations | None:
    """'dynamic', 'static', a grid of inputs, a mapping, or None or 'none'."""
    if data in (None, "none"):
        return None
    if isinstance(data, Mapping):
        fields = check_keys(data, Activations, where)
        return made(lambda: Activations(**fields), where)
    check_choice(where, data, ("dynamic", "static", *INPUT_GRIDS, "none"))
    return Activations(grid=data) if data in INPUT_GRIDS else Activations(dynamic=data == "dynamic")
