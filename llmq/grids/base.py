"""What a grid does to numbers (Rounding), and what every quantizer returns and every format stores (Quantized)."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.table import Grid
from llmq_kernels.reference import dequantize

CHUNK = 1 << 17
"""Numbers at a time, so that temporaries fit the processor's cache."""
READ = 1 << 21
"""Numbers at a time where a weight is only read back."""


class Quantized(Protocol):
    """A rounded weight [out, in], as it is stored: a dataclass with at least these. notes: what fell back."""

    @property
    def scheme(self) -> Scheme:
        """Its grid."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What fell back, for the report."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that is stored, computed in float32 and rounded once to `dtype`."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] on a grid: w ≈ (point − zero) · scale, group by group along the input axis.

    codes: [out, in] in the grid's `code_dtype`; scale: [out, groups], in the dtype it is stored in; zero: int8 [out,
    groups] in the range of the codes, or None when symmetric; notes: what fell back, for the report; input_scale:
    float32 [1], where the input is rounded by a static scale; stored_scale: what is stored in place of `scale`, where
    the grid stores scales as codes too.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = ()
    input_scale: Tensor | None = None
    stored_scale: Any = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the codes stand for, computed in float32 and rounded once to `dtype`."""
        rows, width = self.codes.shape
        weight = torch.empty(rows, width, dtype=dtype, device=self.codes.device)
        rounding = rounding_of(self.scheme.rules)
        # Some rows at a time, so that no float32 copy of the whole is made.
        step = max(1, READ // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            zero = None if self.zero is None else self.zero[part]
            weight[part] = dequantize(rounding.decode(self.codes[part], self.scheme), self.scale[part], zero)
        return weight


class Rounding(ABC):
    """A grid's arithmetic: one class in each grid's file, without state.

    A *point* is a value of the grid, float32; a *code* is a point as it is stored, one byte each. The `scaled` value of
    a weight is w / scale. code_dtype: of codes; scale_dtype: of scales, None for the dtype of the model; even: whether
    the levels are evenly spaced.
    """

    code_dtype: torch.dtype = torch.uint8
    scale_dtype: torch.dtype | None = None
    even: bool = False

    @abstractmethod
    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """Every point, float32 ascending."""

    @abstractmethod
    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """The point nearest to scaled + zero, which is rounded before the zero point is added.

        scaled: float32, may be overwritten; zero: a tensor that broadcasts to it, or None. Returns float32 like scaled.
        """

    @abstractmethod
    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """The codes of points, in code_dtype."""

    @abstractmethod
    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """The points that codes stand for, in float32 or a dtype that turns into it without loss."""

    @abstractmethod
    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The scale [out, groups] of every group, as it is stored, and its zero point, int8 [out, groups] or None.

        weight: any float [out, in]; method: one of the grid's ranges; importance: float [in], for 'weighted'. Raises
        LlmqError when the method is unknown, the groups do not divide the inputs, or the weight is not finite.
        """

    def reach(self, scheme: Scheme) -> float:
        """The largest magnitude of a weight that the scale 1 covers."""
        return float(self.levels(scheme, torch.device("cpu")).abs().amax())

    def settle(self, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Any]:
        """Scales as they come back from disk, and what is stored in their place where that is not themselves."""
        return scale, None

    def round(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, method: str, importance: Tensor | None
    ) -> Quantized:
        """Every weight [out, in] to its nearest point, on the scale that `find_scale` finds."""
        scale, zero = self.find_scale(weight, scheme, method, importance, scale_dtype)
        return self.finish(rounded_on(weight, scale, zero, scheme), scale_dtype)

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> Quantized:
        """The weight as the grid's format stores it; dtype: of the model, which readers make of it."""
        return weight

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """The inverse of `finish`. Raises LlmqError for a weight of another kind."""
        if not isinstance(weight, QuantizedWeight):
            raise LlmqError(f"a {weight.scheme} weight is a QuantizedWeight, not a {type(weight).__name__}")
        return weight

    def round_input(self, scaled: Tensor) -> Tensor:
        """Inputs, in units of their scale and within the grid's limits, to the nearest value, in their own dtype."""
        raise LlmqError(f"{type(self).__name__} leaves inputs as they are")

    def rank(self, points: Tensor, scheme: Scheme) -> Tensor:
        """Which level, counted from the lowest, each point is: float32. Learned rounding moves along these."""
        return torch.searchsorted(self.levels(scheme, points.device), points.contiguous()).to(torch.float32)

    def of_rank(self, ranks: Tensor, scheme: Scheme) -> Tensor:
        """The points of whole ranks, float32: the inverse of `rank`."""
        return self.levels(scheme, ranks.device)[ranks.to(torch.int64)]

    def ranks(self, scheme: Scheme) -> tuple[int, int]:
        """The lowest and the highest rank."""
        return 0, len(self.levels(scheme, torch.device("cpu"))) - 1

    def in_steps(self, away: Tensor, points: Tensor, scheme: Scheme) -> Tensor:
        """How far a value lies from its point (`away`, float32), in steps to the next point on that side."""
        levels = self.levels(scheme, points.device)
        rank = torch.searchsorted(levels, points.contiguous())
        other = (rank + torch.where(away < 0, -1, 1)).clamp_(0, len(levels) - 1)
        step = (levels[other] - levels[rank]).abs()
        # Beyond the last level there is no step to measure with: the value counts as being at it.
        return torch.where(step > 0, away / step, 0.0)


@cache
def rounding_of(grid: Grid) -> Rounding:
    """The arithmetic of a grid."""
    module, _, name = grid.rounding.partition(":")
    made: Rounding = getattr(importlib.import_module(module), name)()
    return made


def rounded_on(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, notes: tuple[str, ...] = ()
) -> QuantizedWeight:
    """A weight [out, in] rounded to nearest on scales [out, groups] and zero points that are known."""
    scale, stored = rounding_of(scheme.rules).settle(scale, scheme)
    codes = round_to_grid(weight, scale, zero, scheme)
    return QuantizedWeight(codes, scale, zero, scheme, notes, stored_scale=stored)


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The code of the nearest point of every weight.

    weight: any float [out, in]; scale: [out, groups]; zero: int8 [out, groups] or None. Returns codes [out, in].
    """
    rounding = rounding_of(scheme.rules)
    rows, width = weight.shape
    groups = scale.shape[1]
    codes = torch.empty(rows, width, dtype=rounding.code_dtype, device=weight.device)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32).reshape(-1, groups, width // groups)
        part = part / scale[start : start + step].to(torch.float32).unsqueeze(-1)
        held = None if zero is None else zero[start : start + step].unsqueeze(-1)
        codes[start : start + step] = rounding.encode(rounding.nearest(part, held, scheme).flatten(1), scheme)
    return codes


def check_range(method: str, scheme: Scheme, width: int) -> None:
    """Raises LlmqError when the grid has no such way to find a scale, or the groups do not divide the inputs."""
    if method not in scheme.rules.ranges:
        raise LlmqError(f"range must be one of {', '.join(scheme.rules.ranges)}, not {method!r}")
    if width == 0 or (scheme.group_size is not None and width % scheme.group_size):
        raise LlmqError(f"group size {scheme.group_size} does not divide the {width} inputs of the weight")


def parts(weight: Tensor, groups: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Some rows at a time: the first row's number, the groups [rows, groups, size] in float32, the largest magnitude
    and the power of two that brings it to 1 or below, each [rows, groups, 1]. Raises LlmqError at values not finite.
    """
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32).reshape(-1, groups, width // groups)
        top = part.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(top).all()):
            raise LlmqError("the weight holds values that are not finite")
        yield start, part, top, torch.exp2(torch.frexp(top).exponent.clamp_(-100, 100).to(torch.float32))


def root_of(importance: Tensor) -> Tensor:
    """The root of the importance [1, groups, size], its mean brought to 1 in each group; all 0 means all equal."""
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0).sqrt_()


def storable(scale: Tensor, dtype: torch.dtype, unit: Tensor | float = 1.0) -> Tensor:
    """A scale, float32 in units of `unit`, as it comes back from disk: rounded to its dtype, finite, normal, not 0."""
    info = torch.finfo(dtype)
    true = scale * unit
    size = true.abs().clamp_(info.tiny, info.max).to(dtype).to(torch.float32)
    return torch.copysign(size, true).div_(unit)
