"""The table of grids, one row each: plain data that does not load torch. Each grid's arithmetic is in a file of its
own.

A grid is a set of values that a weight, divided by its scale, is rounded to. Everything that depends on the grid is
defined here or by the grid's `Rounding` (see `base`); the rest of llmq never checks a grid's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import LlmqError
from llmq.validate import nearest

RANGES = ("minmax", "mse", "weighted", "percentile", "kl", "aciq")
"""All range methods, that is, ways to find a scale."""


@dataclass(frozen=True)
class Limits:
    """The rounding of inputs to 8 bits when the model runs: the lowest and highest value, in units of the scale, and
    the divisor of the largest magnitude that gives the scale.
    """

    low: float
    high: float
    divisor: float


@dataclass(frozen=True)
class Grid:
    """One grid.

    name: as in recipes; label: for people, with `{bits}` for the scheme's bits. bits: the allowed bits of a code, for
    each weight; stored_bits: the stored size of a code if it differs from its bits (it may be a fraction). group_sizes:
    the allowed group sizes, where None is a whole output channel; () allows any. zero_points: whether a group may have
    a zero point. double_quant: whether scales may be quantized to 8 bits. ranges: the allowed range methods, out of
    RANGES; usual: the default without data; calibrated: the default if the importance of the inputs is known. inputs:
    the rounding of 8-bit weights' inputs, None for none. vector_code: the bits of a code that stands for all weights of
    a group, or for one of several vectors that are added; 0 if every weight has a code, and is rounded by itself.
    rounding: its arithmetic, as 'module:Class' (`base.rounding_of` loads it); format: the module under `formats/` that
    stores it; layout: the format's name for how it is stored, if it has a layout of its own.
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
    layout: str = ""
    vector_code: int = 0

    def refusal(self, bits: int, group_size: int | None, symmetric: bool) -> str | None:
        """Why the grid does not allow these bits, group size and symmetry, in a sentence, or None."""
        sizes = not self.group_sizes or group_size in self.group_sizes
        uneven = bool(self.vector_code) and bits * (group_size or 0) % self.vector_code != 0
        if bits in self.bits and sizes and (symmetric or self.zero_points) and not uneven:
            return None
        parts = [f"{self.bits[0]}{f' to {self.bits[-1]}' if len(self.bits) > 1 else ''} bits"]
        parts += [] if self.zero_points else ["symmetric"]
        if self.group_sizes == (None,):
            parts.append("group size 'channel'")
        elif self.group_sizes:
            listed = ", ".join("'channel'" if size is None else str(size) for size in self.group_sizes)
            parts.append(f"in blocks (group size) of {listed}")
        if self.vector_code:
            parts.append(f"and a block has a whole number of codes of {self.vector_code} bits")
        return f"grid {self.name!r} is {', '.join(parts)}"


INT8_INPUTS = Limits(-128.0, 127.0, 127.5)
"""As in compressed-tensors: the largest magnitude becomes 127 or, if negative, −128 (vLLM's kernels divide by 127)."""
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
            layout="float-quantized",
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
        Grid(
            name="nvfp4",
            label="nvfp4",
            bits=(4,),
            rounding="llmq.grids.nvfp4:NVFP4",
            format="compressed_tensors",
            group_sizes=(16,),
            layout="nvfp4-pack-quantized",
        ),
        Grid(
            name="vq",
            label="{bits}-bit vq",
            bits=(1, 2, 3, 4),
            rounding="llmq.grids.vq:VQ",
            format="aqlm",
            group_sizes=(8, 4, 16),
            ranges=("mse", "weighted"),
            vector_code=8,
        ),
        *(
            Grid(
                name=f"mxfp{bits}",
                label=f"mxfp{bits}",
                bits=(bits,),
                rounding=f"llmq.grids.mxfp:MXFP{bits}",
                format="compressed_tensors",
                group_sizes=(32,),
                usual="minmax",
                layout=f"mxfp{bits}-{'pack-' if bits < 8 else ''}quantized",
            )
            for bits in (4, 6, 8)
        ),
    )
}

EACH = tuple(grid.name for grid in GRIDS.values() if not grid.vector_code)
"""The grids on which every weight is rounded by itself."""


def find(name: str) -> Grid:
    """The grid of a name. Raises LlmqError with all names and the nearest one."""
    if name not in GRIDS:
        raise LlmqError(f"grid {name!r} is not known: choose from {', '.join(GRIDS)}{nearest(name, [*GRIDS])}")
    return GRIDS[name]


def inputs_of(name: str) -> Limits:
    """The rounding of inputs for weights of a grid. Raises LlmqError for a grid without input rounding."""
    grid = GRIDS.get(name)
    if grid is None or grid.inputs is None:
        having = " or ".join(g.name for g in GRIDS.values() if g.inputs is not None)
        raise LlmqError(f"activations are rounded on the grid {having}, not {name!r}")
    return grid.inputs
