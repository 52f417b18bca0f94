"""The table of grids, one row each: plain data that does not load torch. Each grid's arithmetic is in a file of its
own.

A grid is a set of values that a weight, divided by its scale, is rounded to. Everything that depends on the grid is
defined here or by the grid's `Rounding` (see `base`); the rest of llmq never checks a grid's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from llmq.errors import LlmqError
from llmq.validate import nearest

RANGES = ("minmax", "mse", "weighted", "percentile", "kl", "aciq")
"""All range methods, that is, ways to find a scale."""
SEARCHED = ("minmax", "mse", "weighted")
"""Those that need no model of how values are distributed."""


@dataclass(frozen=True)
class Inputs:
    """The rounding of inputs when the model runs.

    low, high: the lowest and highest value, in units of the scale; divisor: of the largest magnitude, which gives the
    scale. group_size: inputs of a token that share a scale, which is found as the model runs; None: all of them. A
    static scale is then one of these scales. kinds: 'dynamic', 'static' or both; ranges: of static scales. grid: whose
    values inputs take, if not those of the weights. beside: the bits of the weights that they may stand beside, () for
    all of the grid's.
    """

    low: float
    high: float
    divisor: float
    group_size: int | None = None
    kinds: tuple[str, ...] = ("dynamic", "static")
    ranges: tuple[str, ...] = tuple(name for name in RANGES if name != "weighted")
    grid: str = ""
    beside: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grid:
    """One grid.

    name: as in recipes; label: for people, with `{bits}` for the scheme's bits. bits: the allowed bits of a code, for
    each weight; stored_bits: the stored size of a code if it differs from its bits (it may be a fraction);
    information_bits: log2 of the number of levels, where that is less than the bits. group_sizes: the allowed group
    sizes, where None is a whole output channel; () allows any. rows: the output channels that share a scale, from the
    first on; the last of them may be fewer. zero_points: whether a group may have a zero point. double_quant: whether
    scales may be quantized to 8 bits. ranges: the allowed range methods, out of RANGES; usual: the default without
    data; calibrated: the default if the importance of the inputs is known. inputs: the rounding of the weights' inputs,
    None for none; other_inputs: those that a scheme has to ask for by their grid. vector_code: the bits of a code that
    stands for all weights of a group, or for one of several vectors that are added; 0 if every weight has a code, and
    is rounded by itself. own: the format that stores it for llmq alone, and the stored size of a code there, None if it
    is the same. rounding: its arithmetic, as 'module:Class' (`base.rounding_of` loads it); power_scales, half_scales:
    the same with scales that are powers of two, or that float16 holds, '' if there is none; format: the module under
    `formats/` that stores it; layout: the format's name for how it is stored, if it has a layout of its own; read_as:
    the grid that readers take its codes for, '' for itself; learned: whether the levels of each row are found for the
    weight. span: the inputs whose scales are found together, as they are multiples of one number; 0 if each group has
    its own; minima: whether every group has a zero point that is no whole number; ragged: the grid of weights whose
    width `span` does not divide, '' for none.
    """

    name: str
    label: str
    bits: tuple[int, ...]
    rounding: str
    format: str
    stored_bits: float | None = None
    information_bits: float | None = None
    group_sizes: tuple[int | None, ...] = ()
    rows: int = 1
    zero_points: bool = False
    double_quant: bool = False
    ranges: tuple[str, ...] = SEARCHED
    usual: str = "mse"
    calibrated: str = "weighted"
    inputs: Inputs | None = None
    other_inputs: tuple[Inputs, ...] = ()
    layout: str = ""
    power_scales: str = ""
    half_scales: str = ""
    read_as: str = ""
    learned: bool = False
    span: int = 0
    minima: bool = False
    ragged: str = ""
    vector_code: int = 0
    own: tuple[str, float | None] | None = None

    def refusal(self, bits: int, group_size: int | None, symmetric: bool) -> str | None:
        """Why the grid does not allow these bits, group size and symmetry, in a sentence, or None."""
        sizes = not self.group_sizes or group_size in self.group_sizes
        uneven = bool(self.vector_code) and bits * (group_size or 0) % self.vector_code != 0
        even = not symmetric if self.minima else symmetric or self.zero_points
        if bits in self.bits and sizes and even and not uneven:
            return None
        parts = [f"{self.bits[0]}{f' to {self.bits[-1]}' if len(self.bits) > 1 else ''} bits"]
        parts += ["asymmetric"] if self.minima else [] if self.zero_points else ["symmetric"]
        if self.group_sizes == (None,):
            parts.append("group size 'channel'")
        elif self.group_sizes:
            listed = ", ".join("'channel'" if size is None else str(size) for size in self.group_sizes)
            parts.append(f"in blocks (group size) of {listed}")
        if self.vector_code:
            parts.append(f"and a block has a whole number of codes of {self.vector_code} bits")
        return f"grid {self.name!r} is {', '.join(parts)}"

    def inputs_on(self, grid: str) -> Inputs | None:
        """The rounding of inputs to the values of a grid, '' for the usual one; None if there is none."""
        return next((inputs for inputs in self.other_inputs if inputs.grid == grid), None) if grid else self.inputs


INT8_INPUTS = Inputs(-128.0, 127.0, 127.5)
"""As in compressed-tensors: the largest magnitude becomes 127 or, if negative, −128 (vLLM's kernels divide by 127)."""
FP8_INPUTS = Inputs(-448.0, 448.0, 448.0)
DYNAMIC = ("dynamic",)
BLOCK_INPUTS = Inputs(-448.0, 448.0, 448.0, 128, DYNAMIC)
MXFP8_INPUTS = Inputs(-448.0, 448.0, 448.0, 32, DYNAMIC, grid="mxfp8")
MX_INPUTS = {4: Inputs(-6.0, 6.0, 6.0, 32, DYNAMIC), 6: MXFP8_INPUTS, 8: MXFP8_INPUTS}
"""compressed-tensors and servers have no inputs of 6 bits."""
W4A8_INPUTS = {
    "int": Inputs(-448.0, 448.0, 448.0, None, DYNAMIC, grid="fp8", beside=(4,)),
    "mxfp4": Inputs(-448.0, 448.0, 448.0, 128, DYNAMIC, grid="fp8"),
}
"""compressed-tensors' presets W4AFP8 and MXFP4xFP8."""
NVFP4_INPUTS = Inputs(-2688.0, 2688.0, 2688.0, 16, ("static",), ("minmax", "percentile"))
"""6 times the largest scale of a group, 448; other ranges judge single values, without their groups."""

K_QUANTS = ((2, 16, "q4_0"), (3, 16, "q4_0"), (4, 32, "q5_0"), (5, 32, "q5_0"), (6, 16, "q8_0"))
"""Bits, group size, and the grid for other widths, each as llama.cpp has it, but for types that llmq has not."""

GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            name="int",
            label="{bits}-bit",
            bits=(2, 3, 4, 5, 6, 7, 8),
            rounding="llmq.grids.integer:Integer",
            power_scales="llmq.grids.power_scales:PowerInteger",
            half_scales="llmq.grids.half_scales:HalfInteger",
            format="compressed_tensors",
            zero_points=True,
            ranges=RANGES,
            inputs=INT8_INPUTS,
            other_inputs=(W4A8_INPUTS["int"],),
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
            name="fp8-block",
            label="fp8 block",
            bits=(8,),
            rounding="llmq.grids.float8_block:Float8Block",
            format="compressed_tensors",
            group_sizes=(128,),
            rows=128,
            inputs=BLOCK_INPUTS,
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
            inputs=NVFP4_INPUTS,
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
            own=("codebook", None),
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
                inputs=MX_INPUTS[bits],
                other_inputs=(W4A8_INPUTS["mxfp4"],) if bits == 4 else (),
                layout=f"mxfp{bits}-{'pack-' if bits < 8 else ''}quantized",
            )
            for bits in (4, 6, 8)
        ),
        Grid(
            name="kmeans",
            label="kmeans {bits}-bit",
            bits=(2, 3, 4),
            rounding="llmq.grids.kmeans:KMeans",
            format="codebook",
            group_sizes=(None,),
            learned=True,
        ),
        *(
            Grid(
                name=name,
                label=f"{name} {{bits}}-bit",
                bits=(3, 4),
                rounding=f"llmq.grids.powers:{kind}",
                format="codebook",
            )
            for name, kind in (("log", "Log"), ("apot", "APoT"))
        ),
        *(
            Grid(
                name=name,
                label=name,
                bits=(2,),
                information_bits=log2(levels),
                rounding=f"llmq.grids.{name}:{name.title()}",
                format="compressed_tensors",
                read_as="int",
                own=("codebook", bits),
            )
            for name, levels, bits in (("ternary", 3, 1.6), ("binary", 2, 1.0))
        ),
        *(
            Grid(
                name=f"q{bits}_k",
                label=f"q{bits}_k",
                bits=(bits,),
                rounding="llmq.grids.kquants:KQuant",
                format="ggml",
                group_sizes=(group,),
                layout=f"Q{bits}_K",
                span=256,
                minima=bits in (2, 4, 5),
                ragged=ragged,
            )
            for bits, group, ragged in K_QUANTS
        ),
        *(
            Grid(
                name=f"q{bits}_0",
                label=f"q{bits}_0",
                bits=(bits,),
                rounding="llmq.grids.kquants:BlockInteger",
                format="ggml",
                group_sizes=(32,),
            )
            for bits in (4, 5, 8)
        ),
    )
}
POWER_SCALES = {
    grid.name: replace(grid, rounding=grid.power_scales, ranges=SEARCHED)
    for grid in GRIDS.values()
    if grid.power_scales
}
"""The rows of the grids whose scales may be powers of two, for schemes with such scales."""
HALF_SCALES = {grid.name: replace(grid, rounding=grid.half_scales) for grid in GRIDS.values() if grid.half_scales}
"""The same for scales that float16 holds."""
OWN = {
    grid.name: replace(grid, format=grid.own[0], stored_bits=grid.own[1], read_as="")
    for grid in GRIDS.values()
    if grid.own
}
"""The rows of the grids that llmq's own folder stores in another way, for schemes that are packed so."""

INPUT_GRIDS = tuple(dict.fromkeys(inputs.grid for grid in GRIDS.values() for inputs in grid.other_inputs))
"""The grids of inputs that a scheme may ask for."""

EACH = tuple(grid.name for grid in GRIDS.values() if not grid.vector_code)
"""The grids on which every weight is rounded by itself."""
FIXED = tuple(name for name in EACH if not GRIDS[name].learned)
"""Those of them whose levels do not depend on the weight."""


def find(name: str) -> Grid:
    """The grid of a name. Raises LlmqError with all names and the nearest one."""
    if name not in GRIDS:
        raise LlmqError(f"grid {name!r} is not known: choose from {', '.join(GRIDS)}{nearest(name, [*GRIDS])}")
    return GRIDS[name]


def inputs_of(name: str) -> Inputs:
    """The usual rounding of inputs for weights of a grid. Raises LlmqError for a grid without input rounding."""
    grid = GRIDS.get(name)
    if grid is None or grid.inputs is None:
        having = " or ".join(g.name for g in GRIDS.values() if g.inputs is not None)
        raise LlmqError(f"activations are rounded on the grid {having}, not {name!r}")
    return grid.inputs
