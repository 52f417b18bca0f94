"""Range search: the scale and zero point of a group of weights on the integer grid.

`minmax` covers every weight, so one outlier stretches the grid for its whole group. `mse` clips the extremes if that
lowers Σ(w − ŵ)²; `weighted` does the same for Σ importance·(w − ŵ)², with an importance per input column. Both search
log-spaced scales from above min-max down to a fraction of it; each candidate's codes get their best scale (linear least
squares, closed form). The winner is then refined: finer steps, neighbouring zero points, and rounds of refitting the
scale, rounding it to its stored dtype and choosing the codes again, as long as the error falls. Min-max is tried first
and replaced only by something better, so a search is never worse. `percentile`, `kl` and `aciq` clip by the
distribution of the weights, without a search: see `estimators`.

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

from llmq.grids.base import check_range, parts, storable, weights_of
from llmq.grids.estimators import CLIPPED, Histogram, clip_bounds
from llmq.grids.scheme import Scheme

COARSE = 10
ROUNDS = 2
# From this many bits on, the extra level is on the side of the largest weight; the other side is not tried.
SIDED = 5
# The largest and smallest candidate scale, as fractions of min-max: coarser grids gain from more clipping.
LARGEST = 1.1
SMALLEST = {2: 0.30, 3: 0.35, 4: 0.45, 5: 0.55, 6: 0.65, 7: 0.75, 8: 0.80}
# Final steps around the best scale: at 8 bits a change of half a percent moves the largest codes by one.
FINE = {bits: (0.97, 1.03) if bits < 6 else (0.99, 0.995, 1.005, 1.01) for bits in range(2, 9)}


class _Groups(NamedTuple):
    """A chunk of groups, normalized to magnitude 1, as the search uses it.

    weight: float32 [rows, groups, size]; root: float32 [1, groups, size], the square root of the importance, or None;
    unit: float32 [rows, groups, 1], the power of two that was divided out; dtype: the scale's stored dtype.
    """

    weight: Tensor
    root: Tensor | None
    unit: Tensor
    scheme: Scheme
    dtype: torch.dtype

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as read back from disk: rounded to its dtype, finite, normal, never 0; still for magnitude 1."""
        return storable(scale, self.dtype, self.unit)


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
    for start, part, top, unit in parts(weight, groups):
        step = len(part)
        best = _search(_Groups(part / unit, root, unit, scheme, scale_dtype), method, limit)
        found = torch.where(top > 0, best.scale * unit, 1.0)
        scale[start : start + step] = found.squeeze(-1).to(scale_dtype)
        if zero is not None:
            zero[start : start + step] = torch.where(top > 0, best.zero, 0.0).squeeze(-1).to(torch.int8)
    return scale, zero


def _entropy_limit(weight: Tensor, groups: int, bits: int) -> float:
    """The clip of 'kl', in root mean squares of a group: one value for the whole weight."""
    histogram = Histogram(weight.device)
    for _, part, _, unit in parts(weight, groups):
        histogram.update(part / unit)
    return histogram.limit(bits)


def _search(groups: _Groups, method: str, limit: float) -> _Best:
    """The scale and zero point by min-max or the method's clip, improved by the search if the method has one."""
    scheme, weight = groups.scheme, groups.weight
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
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
    buffer, other, third = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)
    best = _Best(_error(groups, scale, zero, buffer), scale.clone(), zero.clone())
    start, zero = _coarse(groups, scale, low, high, buffer, other, third)
    for _ in range(ROUNDS):
        start = groups.stored(start)
        error, fit = _error_and_fit(groups, start, zero, buffer, other, third)
        best.take(error, start, zero)
        start = fit
    for shift in (0,) if scheme.symmetric else (0, -1, 1):
        zero = (best.zero + shift).clamp_(scheme.qmin, scheme.qmax)
        center = best.scale.clone()
        if shift:
            center = groups.stored(_error_and_fit(groups, center, zero, buffer, other, third)[1])
            best.take(_error(groups, center, zero, buffer), center, zero)
        for factor in FINE[scheme.bits]:
            scale = groups.stored(center * factor)
            best.take(_error(groups, scale, zero, buffer), scale, zero)
    return best


def _coarse(
    groups: _Groups, top: Tensor, low: Tensor, high: Tensor, buffer: Tensor, other: Tensor, third: Tensor
) -> tuple[Tensor, Tensor]:
    """The best of the log-spaced scales and its zero point, judged by the least error of its codes with any scale.

    For codes c − z = k and weights a, Σ a(w − s·k)² is minimal at s = Σ a·w·k / Σ a·k², with the value Σ a·w² − (Σ
    a·w·k)² / Σ a·k²: two sums give both the best scale for these codes and its error.
    """
    scheme, root = groups.scheme, groups.root
    pull = groups.weight if root is None else groups.weight * root
    ratio = (SMALLEST[scheme.bits] / LARGEST) ** (1 / (COARSE - 1))
    scales = [top * (LARGEST * ratio**index) for index in range(COARSE)]
    zeros = [_zeros(scheme, low, high, scale) for scale in scales]
    dots = top.new_empty((COARSE * len(zeros[0]), *top.shape))
    sizes = torch.empty_like(dots)
    for index, scale in enumerate(scales):
        torch.mul(groups.weight, scale.reciprocal(), out=other).round_()
        for inside, zero in enumerate(zeros[index]):
            _clip(other, scheme, zero, buffer)
            if root is not None:
                buffer *= root
            place = index * len(zeros[0]) + inside
            torch.sum(torch.mul(buffer, buffer, out=third), -1, keepdim=True, out=sizes[place])
            torch.sum(torch.mul(buffer, pull, out=third), -1, keepdim=True, out=dots[place])
    dots /= sizes.clamp_min(torch.finfo(torch.float32).tiny)
    winner = sizes.mul_(dots).mul_(dots).argmax(0, keepdim=True)
    scale = dots.gather(0, winner)[0]
    tried = [torch.as_tensor(zero, device=top.device).expand_as(top) for each in zeros for zero in each]
    zero = torch.stack(tried).gather(0, winner)[0]
    if scheme.symmetric:
        # Level −k of the mirrored grid is level k of the grid itself with a negative scale.
        scale, zero = torch.where(zero < 0, -scale, scale), torch.zeros_like(zero)
    return torch.where(scale == 0, top, scale), zero


def _zeros(scheme: Scheme, low: Tensor, high: Tensor, scale: Tensor) -> list[Tensor | float]:
    """Candidate zero points for a scale: those that divide the clipping about evenly between both ends.

    Symmetric: 0, and −1 for the mirrored grid, whose levels are those of a zero point of −1.
    """
    if scheme.symmetric:
        if scheme.bits >= SIDED:
            return [(high > -low).to(torch.float32).neg_()]
        return [0.0, -1.0]
    below, above = scheme.qmin - low / scale, scheme.qmax - high / scale
    return [zero.round_().clamp_(scheme.qmin, scheme.qmax) for zero in ((below + above) / 2, below, above)]


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
    """Σ importance·(w − ŵ)² of each group [rows, groups, 1]."""
    levels = _levels(groups, scale, zero, buffer)
    left = torch.addcmul(groups.weight, levels, scale, value=-1, out=buffer)
    if groups.root is not None:
        left *= groups.root
    return left.square_().sum(-1, keepdim=True)


def _error_and_fit(
    groups: _Groups, scale: Tensor, zero: Tensor, buffer: Tensor, other: Tensor, third: Tensor
) -> tuple[Tensor, Tensor]:
    """The error of a scale, and the least-squares scale for its codes: both [rows, groups, 1]."""
    levels = _levels(groups, scale, zero, buffer)
    left = torch.addcmul(groups.weight, levels, scale, value=-1, out=other)
    if groups.root is not None:
        left *= groups.root
        levels *= groups.root
    # The correction of the scale is fitted to the residual, which avoids cancellation, even at 8 bits.
    change = torch.mul(left, levels, out=third).sum(-1, keepdim=True)
    size = levels.square_().sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return left.square_().sum(-1, keepdim=True), change.div_(size).add_(scale)
