"""A grid's arithmetic (Rounding), and the result that quantizers return and formats store (Quantized)."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.table import Grid
from llmq.machine import by_rows
from llmq_kernels.int_linear.reference import dequantize

CHUNK = 1 << 18
"""Elements processed at a time, so that temporaries fit the processor's cache."""
READ = 1 << 18
"""Elements processed at a time for dequantization."""


class Quantized(Protocol):
    """A quantized weight [out, in] in its stored form: a dataclass with at least these fields."""

    @property
    def scheme(self) -> Scheme:
        """Its grid."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The fallbacks that were used, for the report."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The stored weight [out, in], computed in float32 and rounded once to `dtype`."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] on a grid: w ≈ (point − zero) · scale, with groups along the input axis.

    codes: [out, in] in the grid's `code_dtype`; scale: [out, groups], in the dtype it is stored in; zero: [out, groups]
    in the grid's `zero_dtype`, in the range of the codes, or None when symmetric; notes: fallbacks used, for the
    report; input_scale: float32 [1], if the input is rounded with a static scale; stored_scale: what is stored instead
    of `scale`, if the grid stores scales as codes; levels: float32 [out, points], the ascending points of each row, if
    the grid learns them (codes are then their indices).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = ()
    input_scale: Tensor | None = None
    stored_scale: Any = None
    levels: Tensor | None = None

    @property
    def rounding(self) -> Rounding:
        """The arithmetic of its grid, with its own levels."""
        return rounding_of(self.scheme.rules).on(self.levels)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in], computed in float32 and rounded once to `dtype`."""
        rows, width = self.codes.shape
        weight = torch.empty(rows, width, dtype=dtype, device=self.codes.device)
        rounding = self.rounding

        def work(part: slice) -> None:
            zero = None if self.zero is None else self.zero[part]
            points = rounding.part(part).decode(self.codes[part], self.scheme)
            weight[part] = dequantize(points, self.scale[part], zero)

        # Some rows at a time, so that there is no float32 copy of the whole weight.
        by_rows(rows, max(1, READ // width), work, weight.device)
        return weight


ROWS = 2048
"""How many rows of a weight are rounded together on a CPU, where rows can be rounded apart."""


def pieces(rows: int, scheme: Scheme, device: torch.device) -> list[slice]:
    """The rows that are rounded together. What is computed of a piece has the same bytes wherever it is computed."""
    step = ROWS if rounding_of(scheme.rules).apart and device.type == "cpu" else max(1, rows)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """A weight whose rows were rounded apart, in their order."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


class Units(NamedTuple):
    """Of what each group's scale, and its zero point times its scale, are whole multiples, which a solver may change.

    scale: float32 [out, groups]; limits: of its multiples, 0 left out; minimum: the same of zero points, None
    where there are none; highest: of its multiples, which begin at 0.
    """

    scale: Tensor
    limits: tuple[int, int]
    minimum: Tensor | None
    highest: int


class Rounding(ABC):
    """A grid's arithmetic: one class in each grid's file. It has no state, but for the levels of a weight's rows where
    a grid learns them: `fitted` finds them, `on` takes those of a quantized weight, and the first axis of every tensor
    is then that of the rows.

    A *point* is a value of the grid, float32; a *code* is the stored form of a point, one byte each. The `scaled` value
    of a weight is w / scale. code_dtype: of codes; scale_dtype: of scales, None for the dtype of the model;
    zero_dtype: of zero points, which are whole numbers but where a grid stores something else in their place; even:
    whether the levels are evenly spaced; apart: whether rows of a weight can be rounded without the others.
    """

    code_dtype: torch.dtype = torch.uint8
    scale_dtype: torch.dtype | None = None
    zero_dtype: torch.dtype = torch.int8
    even: bool = False
    apart: bool = True

    @abstractmethod
    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """Every point, float32 ascending."""

    @abstractmethod
    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """The point nearest to `scaled`, plus the zero point, clipped to the grid.

        scaled: float32, may be overwritten; zero: a tensor that broadcasts to it, or None. Returns float32 like scaled.
        """

    @abstractmethod
    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """The codes of the points, in code_dtype."""

    @abstractmethod
    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """The points of the codes, in float32 or a dtype that converts to it exactly."""

    @abstractmethod
    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The scale of every group in its stored dtype, [out, groups], and its zero point, [out, groups] in the
        grid's `zero_dtype`, or None.

        weight: any float [out, in]; method: one of the grid's ranges; importance: float [in], for 'weighted'. Raises
        LlmqError if the method is unknown, the group size does not divide the inputs, or the weight is not finite.
        """

    def fitted(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> Rounding:
        """This arithmetic with levels for a weight, where the grid learns them; arguments as in `find_scale`."""
        return self

    def on(self, levels: Tensor | None) -> Rounding:
        """This arithmetic with given levels [out, points] of a weight's rows, where the grid learns them."""
        return self

    def part(self, rows: slice) -> Rounding:
        """This arithmetic for some of the rows."""
        return self

    @property
    def learned(self) -> Tensor | None:
        """The levels of each row, float32 [out, points], where the grid learns them."""
        return None

    def reach(self, scheme: Scheme) -> float:
        """The largest magnitude that the grid covers at scale 1."""
        return float(self.levels(scheme, torch.device("cpu")).abs().amax())

    def storable(self, scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
        """The nearest scale that can be stored in `dtype`, or as the grid stores it: finite, normal, not 0.

        scale: float32, in units of `unit`, a power of two, as is the result.
        """
        return storable(scale, dtype, unit)

    def settle(self, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None, Any]:
        """The scales and zero points as read back from disk, and what is stored in their place (None: themselves)."""
        return scale, zero, None

    def units(self, weight: QuantizedWeight) -> Units | None:
        """Of what the scales of a weight are multiples, where that is how they are stored."""
        return None

    def round(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, method: str, importance: Tensor | None
    ) -> Quantized:
        """The weight [out, in] rounded to nearest, with the scales of `find_scale`."""
        found = self.fitted(weight, scheme, method, importance, scale_dtype)
        scale, zero = found.find_scale(weight, scheme, method, importance, scale_dtype)
        return self.finish(rounded_on(weight, scale, zero, scheme, levels=found.learned), scale_dtype)

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> Quantized:
        """The weight in the form that the grid's format stores; dtype: of the model, to which readers dequantize."""
        return weight

    def join(self, weights: Sequence[Quantized], dtype: torch.dtype) -> list[Quantized]:
        """Finished weights of this grid, of which a server makes one matrix, with whatever they must have in common."""
        return [*weights]

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """The inverse of `finish`. Raises LlmqError for another kind of weight."""
        if not isinstance(weight, QuantizedWeight):
            raise LlmqError(f"a {weight.scheme} weight is a QuantizedWeight, not a {type(weight).__name__}")
        return weight

    def round_input(self, scaled: Tensor) -> Tensor:
        """Round inputs, already divided by their scale, to nearest, in their own dtype; clipped to the grid."""
        raise LlmqError(f"{type(self).__name__} does not round inputs")

    def input_scale(self, top: Tensor, divisor: float, static: Tensor | None) -> Tensor:
        """The scales of tokens, or of groups of inputs, that have the largest magnitudes `top`; not 0.

        top: any float, of any shape, in whose dtype compressed-tensors computes; divisor: as the grid's row has it;
        static: the scale of these scales, float32 [1], if the grid has one.
        """
        scale = top / divisor
        return scale.masked_fill_(scale == 0, torch.finfo(top.dtype).eps)

    def rank(self, points: Tensor, scheme: Scheme) -> Tensor:
        """The index of each point among the levels in ascending order, float32. Learned rounding changes ranks."""
        return torch.searchsorted(self.levels(scheme, points.device), points.contiguous()).to(torch.float32)

    def of_rank(self, ranks: Tensor, scheme: Scheme) -> Tensor:
        """The points of whole-number ranks, float32: the inverse of `rank`."""
        return self.levels(scheme, ranks.device)[ranks.to(torch.int64)]

    def ranks(self, scheme: Scheme) -> tuple[int, int]:
        """The lowest and the highest rank."""
        return 0, len(self.levels(scheme, torch.device("cpu"))) - 1

    def whole(self, scheme: Scheme) -> tuple[int, int] | None:
        """The lowest and the highest point, where points are all whole numbers between and so are zero points."""
        return None

    def in_steps(self, away: Tensor, points: Tensor, scheme: Scheme) -> Tensor:
        """The distance `away` (float32) of a value from its point, in steps to the next point on that side."""
        levels = self.levels(scheme, points.device)
        rank = torch.searchsorted(levels, points.contiguous())
        other = (rank + torch.where(away < 0, -1, 1)).clamp_(0, len(levels) - 1)
        step = (levels[other] - levels[rank]).abs()
        # Beyond the last level there is no step: the distance counts as 0.
        return torch.where(step > 0, away / step, 0.0)


def with_input_scale(quantized: Quantized, scale: Tensor | None) -> Quantized:
    """The weight with the static scale of its input, which is stored with it."""
    if scale is None or not isinstance(quantized, QuantizedWeight):
        return quantized
    return replace(quantized, input_scale=scale)


@cache
def rounding_of(grid: Grid) -> Rounding:
    """The arithmetic of a grid."""
    module, _, name = grid.rounding.partition(":")
    made: Rounding = getattr(importlib.import_module(module), name)()
    return made


def rounded_on(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    notes: tuple[str, ...] = (),
    levels: Tensor | None = None,
) -> QuantizedWeight:
    """A weight [out, in] rounded to nearest with given scales [out, groups], zero points, and levels of its rows."""
    scale, zero, stored = rounding_of(scheme.rules).settle(scale, zero, scheme)
    codes = round_to_grid(weight, scale, zero, scheme, levels)
    return QuantizedWeight(codes, scale, zero, scheme, notes, stored_scale=stored, levels=levels)


def round_to_grid(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, levels: Tensor | None = None
) -> Tensor:
    """The code of each element's nearest point.

    weight: any float [out, in]; scale: [out, groups]; zero: [out, groups] or None; levels: of each row, where the
    grid learns them. Returns codes [out, in].
    """
    rounding = rounding_of(scheme.rules).on(levels)
    rows, width = weight.shape
    groups = scale.shape[1]
    codes = torch.empty(rows, width, dtype=rounding.code_dtype, device=weight.device)

    def work(some: slice) -> None:
        part = weight[some].to(torch.float32).reshape(-1, groups, width // groups)
        part = part / scale[some].to(torch.float32).unsqueeze(-1)
        held = None if zero is None else zero[some].unsqueeze(-1)
        here = rounding.part(some)
        codes[some] = here.encode(here.nearest(part, held, scheme).flatten(1), scheme)

    by_rows(rows, max(1, CHUNK // width), work, weight.device)
    return codes


def check_range(method: str, scheme: Scheme, width: int) -> None:
    """Raises LlmqError if the grid does not have this range method, or the group size does not divide the inputs."""
    if method not in scheme.rules.ranges:
        raise LlmqError(f"range must be one of {', '.join(scheme.rules.ranges)}, not {method!r}")
    if width == 0 or (scheme.group_size is not None and width % scheme.group_size):
        raise LlmqError(f"group size {scheme.group_size} does not divide the {width} inputs of the weight")


class Part(NamedTuple):
    """Some rows of a weight. rows: which; weight: float32 [rows, groups, size]; low, high: the extremes of each
    group, and unit: the power of two that scales it to at most 1, each [rows, groups, 1]."""

    rows: slice
    weight: Tensor
    low: Tensor
    high: Tensor
    unit: Tensor

    @property
    def top(self) -> Tensor:
        """The largest magnitude of each group."""
        return torch.maximum(self.high, -self.low)


def parts(weight: Tensor, groups: int) -> Iterator[Part]:
    """Yields some rows at a time. Raises LlmqError if a value is not finite."""
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        yield part_of(weight, groups, slice(start, min(start + step, rows)))


def part_of(weight: Tensor, groups: int, rows: slice) -> Part:
    """Some rows of a weight. Raises LlmqError if a value is not finite."""
    part = weight[rows].to(torch.float32).reshape(-1, groups, weight.shape[1] // groups)
    low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    top = torch.maximum(high, -low)
    if not bool(torch.isfinite(top).all()):
        raise LlmqError("the weight holds values that are not finite")
    unit = torch.exp2(torch.frexp(top).exponent.clamp_(-100, 100).to(torch.float32))
    return Part(rows, part, low, high, unit)


def weights_of(method: str, importance: Tensor | None, groups: int) -> Tensor | None:
    """The root of a method's weights of the inputs [1, groups, size], None if all count the same.

    Raises LlmqError for 'weighted' without any importance.
    """
    if method != "weighted":
        return None
    if importance is None:
        raise LlmqError("range 'weighted' needs the importance of every input; use 'mse' without it")
    return root_of(importance.to(torch.float32).view(1, groups, -1))


def root_of(importance: Tensor) -> Tensor:
    """The square root of the importance [1, groups, size], normalized to mean 1 in each group; all 0 counts as all
    equal.
    """
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0).sqrt_()


def storable(scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
    """A scale as read back from disk: rounded to its dtype, finite, normal, not 0; float32, in units of `unit`."""
    info = torch.finfo(dtype)
    true = scale * unit
    size = true.abs().clamp_(info.tiny, info.max).to(dtype).to(torch.float32)
    return torch.copysign(size, true).div_(unit)
