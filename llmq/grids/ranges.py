"""Range search: the scale and zero point of a group of weights on the integer grid.

`minmax` covers every weight, so one outlier stretches the grid for its whole group. `mse` clips the extremes if that
lowers Σ(w − ŵ)²; `weighted` does the same for Σ importance·(w − ŵ)², with an importance per input column. Both judge
log-spaced scales from above min-max down to a fraction of it, each with the best scale for its codes, all at once by
looked-up sums (`candidates`; with zero points of 5 bits and more, where that would need too large a table, one by one).
The winner's scale is fitted again to its exact codes, rounded to its stored dtype and measured; from 6 bits on so are
its neighbours. Min-max is measured first and replaced only by something better, so a search is never worse.
`percentile`, `kl` and `aciq` clip by the distribution of the weights, without a search: see `estimators`.

A symmetric grid with an even number of levels has one extra negative level. A negative scale makes it an extra positive
level; every reader accepts negative scales, and at 2 bits this is worth a third of a bit (auto-round does the same:
Cheng et al. 2023, arXiv:2309.05516).

Everything is computed in float32, on groups normalized to magnitude 1 by an exact power of two, so that squares neither
overflow nor underflow. The weight is processed in chunks that fit the processor's cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.grids import base
from llmq.grids.base import Part, check_range, part_of, parts, storable, weights_of
from llmq.grids.candidates import SIDED, best_candidate, scales_of
from llmq.grids.estimators import CLIPPED, Histogram, clip_bounds
from llmq.grids.scheme import Scheme
from llmq.machine import by_rows

TRIED = 16
"""Scales that are tried one by one, with zero points of 5 bits and more."""
FINE = dict.fromkeys((6, 7, 8), (0.995, 1.005))
"""Final steps around the best scale: at 8 bits a change of half a percent moves the largest codes by one."""


class _Groups(NamedTuple):
    """A chunk of groups, normalized to magnitude 1, as the search uses it.

    weight: float32 [rows, groups, size]; root: float32 [1, groups, size], the square root of the importance, or None;
    part: what they were; dtype: the scale's stored dtype.
    """

    weight: Tensor
    root: Tensor | None
    part: Part
    scheme: Scheme
    dtype: torch.dtype

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as read back from disk: rounded to its dtype, finite, normal, never 0; still for magnitude 1."""
        return storable(scale, self.dtype, self.part.unit)


class _Best(NamedTuple):
    """The best candidate so far, each [rows, groups, 1] float32: the error, the stored scale, the zero point."""

    error: Tensor
    scale: Tensor
    zero: Tensor

    def take(self, error: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Overwrite in place the groups whose new error is lower."""
        better = error < self.error
        for mine, new in zip(self, (error, scale, zero), strict=True):
            torch.where(better, new, mine, out=mine)


def find_range(
    weight: Tensor,
    scheme: Scheme,
    method: str = "minmax",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of every group.

    weight: any float [out, in], `in` a multiple of the group size; method: see above; importance: float [in], not
    negative, required by 'weighted' and otherwise unused; scale_dtype: the scale's stored dtype.
    Returns the scale [out, groups] in scale_dtype, finite and never 0 (1 if a whole group is 0; it may be negative if
    the scheme is symmetric), and the zero point int8 [out, groups], or None if the scheme is symmetric. Raises
    LlmqError if the group size does not divide `in`, the method is unknown, or the weight is not finite.

    Temporaries stay below a few MiB for any matrix, unless a single row is larger.
    """
    rows, width = weight.shape
    check_range(method, scheme, width)
    groups = scheme.groups(width)
    root = weights_of(method, importance, groups)
    limit = _entropy_limit(weight, groups, scheme.bits) if method == "kl" else math.inf
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
    zero = None if scheme.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=weight.device)

    def work(some: slice) -> None:
        part = part_of(weight, groups, some)
        best = _search(_Groups(part.weight / part.unit, root, part, scheme, scale_dtype), method, limit)
        scale[some] = torch.where(part.top > 0, best.scale * part.unit, 1.0).squeeze(-1).to(scale_dtype)
        if zero is not None:
            zero[some] = torch.where(part.top > 0, best.zero, 0.0).squeeze(-1).to(torch.int8)

    by_rows(rows, max(1, base.CHUNK // width), work, weight.device)
    return scale, zero


def _entropy_limit(weight: Tensor, groups: int, bits: int) -> float:
    """The clip of 'kl', in root mean squares of a group: one value for the whole weight."""
    histogram = Histogram(weight.device)
    for part in parts(weight, groups):
        histogram.update(part.weight / part.unit)
    return histogram.limit(bits)


def _search(groups: _Groups, method: str, limit: float) -> _Best:
    """The scale and zero point by min-max or the method's clip, improved by the search if the method has one."""
    scheme, weight = groups.scheme, groups.weight
    low, high = groups.part.low / groups.part.unit, groups.part.high / groups.part.unit
    if method in CLIPPED:
        low, high = clip_bounds(weight, method, scheme.bits, scheme.symmetric, limit)
    if scheme.symmetric:
        scale = groups.stored(torch.maximum(high, -low) * (2 / (2**scheme.bits - 1)))
        zero = torch.zeros_like(scale)
    else:
        bottom = low.clamp(max=0)
        scale = groups.stored((high.clamp(min=0) - bottom) / (2**scheme.bits - 1))
        zero = (scheme.qmin - bottom / scale).round_().clamp_(scheme.qmin, scheme.qmax)
    if method not in ("mse", "weighted"):
        return _Best(scale, scale, zero)
    buffer = torch.empty_like(weight)
    best = _Best(_error(groups, scale, zero, buffer), scale.clone(), zero.clone())
    if scheme.symmetric or scheme.bits < SIDED:
        importance = None if groups.root is None else groups.root.square()
        start, zero = best_candidate(weight, low, high, scheme, importance)
        start = groups.stored(torch.where(start == 0, scale, start))
        _take_fitted(groups, best, start, zero, buffer)
    else:
        for fraction in scales_of(scheme.bits, TRIED):
            start = groups.stored(scale * fraction)
            # What the range leaves out is left out at both ends, or at one.
            at_low, at_high = scheme.qmin - low / start, scheme.qmax - high / start
            for zero in ((at_low + at_high) / 2, at_low, at_high):
                _take_fitted(groups, best, start, zero.round_().clamp_(scheme.qmin, scheme.qmax), buffer)
        middle = best.zero.clone()
        for step in (-1, 1):
            zero = (middle + step).clamp_(scheme.qmin, scheme.qmax)
            _take_fitted(groups, best, best.scale.clone(), zero, buffer)
    center, zero = best.scale.clone(), best.zero.clone()
    for factor in FINE.get(scheme.bits, ()):
        start = groups.stored(center * factor)
        best.take(_error(groups, start, zero, buffer), start, zero)
    return best


def _levels(groups: _Groups, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
    """code − zero of every element on the grid of `scale` and `zero`, as float32, into `out`."""
    torch.div(groups.weight, scale, out=out).round_()
    return _clip(out, groups.scheme, 0.0 if groups.scheme.symmetric else zero, out)


def _clip(levels: Tensor, scheme: Scheme, zero: Tensor | float, out: Tensor) -> Tensor:
    """The levels clipped to those of the grid with this zero point, into `out`."""
    if isinstance(zero, float):
        return torch.clamp(levels, scheme.qmin - zero, scheme.qmax - zero, out=out)
    # torch.clamp with tensor bounds takes four times as long.
    torch.maximum(levels, scheme.qmin - zero, out=out)
    return torch.minimum(out, scheme.qmax - zero, out=out)


def _error(groups: _Groups, scale: Tensor, zero: Tensor, buffer: Tensor) -> Tensor:
    """The root of Σ importance·(w − ŵ)² of each group [rows, groups, 1]."""
    levels = _levels(groups, scale, zero, buffer)
    left = torch.addcmul(groups.weight, levels, scale, value=-1, out=buffer)
    if groups.root is not None:
        left *= groups.root
    error: Tensor = torch.linalg.vector_norm(left, dim=-1, keepdim=True)
    return error


def _take_fitted(groups: _Groups, best: _Best, scale: Tensor, zero: Tensor, buffer: Tensor) -> None:
    """Take, where it is better, the least-squares scale for the codes that a scale and zero point give."""
    levels, weight = _levels(groups, scale, zero, buffer), groups.weight
    if groups.root is not None:
        levels *= groups.root
        weight = weight * groups.root
    size = torch.linalg.vector_norm(levels, dim=-1, keepdim=True).square_()
    fit = levels.mul_(weight).sum(-1, keepdim=True).div_(size)
    fitted = groups.stored(torch.where(fit * scale > 0, fit, scale))
    best.take(_error(groups, fitted, zero, buffer), fitted, zero)
