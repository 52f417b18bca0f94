"""The grids there are, a row each. Plain data that loads no torch; the arithmetic of each is in a file beside this one.

A grid is a set of values that a weight, divided by its scale, is rounded to. Everything that depends on which grid a
weight is on is told here or by the grid's `Rounding` (see `base`); the rest of llmq asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import LlmqError
from llmq.validate import nearest

RANGES = ("minmax", "mse", "weighted", "percentile", "kl", "aciq")
"""Every way to find a scale that some grid has."""


@dataclass(frozen=True)
class Limits:
    """How inputs are rounded to 8 bits when the model runs: the lowest and highest value, in units of the scale, and
    what the largest magnitude is divided by to give the scale."""

    low: float
    high: float
    divisor: float


@dataclass(frozen=True)
class Grid:
    """One grid.

    name: as recipes write it; label: as people read it, `{bits}` stands for the scheme's bits. bits: the bits of a code
    that it can have; stored_bits: what a code takes on disk, where that is not its bits (it may be a fraction).
    group_sizes: how many weights can share a scale, None being all of an output channel; () is any number. zero_points:
    whether a group may have a zero point. double_quant: whether scales may be stored in 8 bits themselves. ranges: how
    the scale of a group can be found, out of RANGES; usual: without data; calibrated: where the importance of the
    inputs is known. inputs: how the inputs of 8-bit weights are rounded, None where they are left alone. rounding:
    where its arithmetic is, 'module:Class' (`base.rounding_of` loads it); format: the module under `formats/` that
    stores it.
    """

    name: str
    label: str
    bits: tuple[int, ...]
    rounding: str
    format: str
    stored_bits: float | None = None
    group_sizes: tuple[int | None, ...] = ()
    zero_points: bool = False
    double_quant: bool = False
    ranges: tuple[str, ...] = ("minmax", "mse", "weighted")
    usual: str = "mse"
    calibrated: str = "weighted"
    inputs: Limits | None = None

    def refusal(self, bits: int, group_size: int | None, symmetric: bool) -> str | None:
        """Why it has no scheme of these bits, group size and symmetry, in a sentence, or None."""
        sizes = not self.group_sizes or group_size in self.group_sizes
        if bits in self.bits and sizes and (symmetric or self.zero_points):
            return None
        told = [f"{self.bits[0]}{f' to {self.bits[-1]}' if len(self.bits) > 1 else ''} bits"]
        told += [] if self.zero_points else ["symmetric"]
        if self.group_sizes == (None,):
            told.append("group size 'channel'")
        elif self.group_sizes:
            listed = ", ".join("'channel'" if size is None else str(size) for size in self.group_sizes)
            told.append(f"in blocks (group size) of {listed}")
        return f"grid {self.name!r} is {', '.join(told)}"


INT8_INPUTS = Limits(-128.0, 127.0, 127.5)
"""As compressed-tensors rounds: the largest magnitude becomes 127 or, below 0, −128 (vLLM's kernels divide by 127)."""
FP8_INPUTS = Limits(-448.0, 448.0, 448.0)

GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            name="int",
            label="{bits}-bit",
            bits=(2, 3, 4, 5, 6, 7, 8),
            rounding="llmq.grids.integer:Integer",
            format="compressed_tensors",
            zero_points=True,
            ranges=RANGES,
            inputs=INT8_INPUTS,
        ),
        Grid(
            name="fp8",
            label="fp8",
            bits=(8,),
            rounding="llmq.grids.float8:Float8",
            format="compressed_tensors",
            group_sizes=(None,),
            calibrated="mse",
            inputs=FP8_INPUTS,
        ),
        Grid(
            name="nf4",
            label="nf4",
            bits=(4,),
            rounding="llmq.grids.nf4:NF4",
            format="bitsandbytes",
            group_sizes=(32, 64, 128, 256, 512, 1024, 2048, 4096),
            double_quant=True,
            usual="minmax",
            calibrated="minmax",
        ),
    )
}


def find(name: str) -> Grid:
    """The grid of a name. Raises LlmqError with all of them and the nearest."""
    if name not in GRIDS:
        raise LlmqError(f"grid {name!r} is not known: choose from {', '.join(GRIDS)}{nearest(name, [*GRIDS])}")
    return GRIDS[name]


def inputs_of(name: str) -> Limits:
    """How inputs are rounded beside weights of a grid. Raises LlmqError where the grid leaves them alone."""
    grid = GRIDS.get(name)
    if grid is None or grid.inputs is None:
        having = " or ".join(g.name for g in GRIDS.values() if g.inputs is not None)
        raise LlmqError(f"activations are rounded on the grid {having}, not {name!r}")
    return grid.inputs
