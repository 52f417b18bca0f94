"""Which scale and zero point a group of weights gets, and which code each weight gets then.

Searched or told. `minmax` covers every weight: the extremes decide, one outlier stretches the grid for its whole group.
`mse` lets the extremes clip where that lowers Σ(w − ŵ)²; `weighted` does the same for Σ importance·(w − ŵ)², where the
importance of a column is how much its input matters. Both search: scales from above min-max down to a fraction of it,
log-spaced; each candidate's codes are followed by the scale that fits those codes best (linear least squares, a closed
form); then the winner is refined: finer steps, neighbouring zero points, and rounds of refit → round the scale to its
stored dtype → choose the codes anew, keeping only what lowers the error. What min-max gives is the first thing tried
and is replaced only by something better, so a search is never worse. `percentile`, `kl` and `aciq` tell where to clip
from how the weights are distributed, without a search: see `estimators`.

A symmetric grid of an even number of levels has one more on the negative side. A negative scale puts it on the positive
side; that is an ordinary value for every reader, and worth a third of a bit at 2 bits (auto-round does the same:
Cheng et al. 2023, arXiv:2309.05516).

Everything is in float32, on groups first brought to magnitude 1 by an exact power of two, so that
neither half precision nor tiny weights overflow or vanish when squared. WeightState goes through chunks that fit the
processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.estimators import CLIPPED, Histogram, clip_bounds
from llmq.grids.scheme import RANGES, Scheme

CHUNK = 1 << 17
COARSE = 10
ROUNDS = 2
# From this many bits on, the extra level goes to the side of the largest weight without trying the other.
SIDED = 5
# The largest and smallest scale tried, as shares of min-max: the coarser the grid, the more clipping can pay.
LARGEST = 1.1
SMALLEST = {2: 0.30, 3: 0.35, 4: 0.45, 5: 0.55, 6: 0.65, 7: 0.75, 8: 0.80}
# Steps around the best scale, at last: at 8 bits a change of half a percent moves the largest codes by a whole one.
FINE = {bits: (0.97, 1.03) if bits < 6 else (0.99, 0.995, 1.005, 1.01) for bits in range(2, 9)}


class _Groups(NamedTuple):
    """A chunk of groups, brought to magnitude 1: what the search below works on.

    weight: float32 [rows, groups, size]; root: float32 [1, groups, size], the square root of the importance, or None;
    unit: float32 [rows, groups, 1], the power of two that was divided out; dtype: what the scale is stored in.
    """

    weight: Tensor
    root: Tensor | None
    unit: Tensor
    scheme: Scheme
    dtype: torch.dtype

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as it comes back from disk: rounded to its dtype, finite, normal, never 0; still in units of 1."""
        info = torch.finfo(self.dtype)
        true = scale * self.unit
        size = true.abs().clamp_(info.tiny, info.max).to(self.dtype).to(torch.float32)
        return torch.copysign(size, true).div_(self.unit)


class _Best(NamedTuple):
    """The best so far, each [rows, groups, 1] float32: the error, the stored scale, the zero point."""

    error: Tensor
    scale: Tensor
    zero: Tensor

    def take(self, error: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Overwrites in place where the new error is lower."""
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

    weight: any float [out, in], the group size dividing in; method: one of RANGES; importance: float [in], not
    negative, used by 'weighted' only, where it is required; scale_dtype: what the scale is stored in.
    Returns the scale [out, groups] in scale_dtype, finite and never 0 (1 where a whole group is 0; it may be negative
    when the scheme is symmetric), and the zero point int8 [out, groups], or None when the scheme is symmetric.
    Raises LlmqError when the group size does not divide in, the method is unknown, or the weight is not finite.

    Temporaries stay below a few MiB whatever the matrix, unless one row is longer than that.
    """
    rows, width = weight.shape
    check_range(method, scheme, width)
    if method == "weighted" and importance is None:
        raise LlmqError("range 'weighted' needs the importance of every input; use 'mse' where there is none")
    groups = scheme.groups(width)
    root = None
    if method == "weighted" and importance is not None:
        root = _root(importance.to(torch.float32).view(1, groups, -1))
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


def check_range(method: str, scheme: Scheme, width: int) -> None:
    """Raises LlmqError when there is no such way to choose a range, or the groups do not divide the inputs."""
    if method not in RANGES:
        raise LlmqError(f"range must be one of {', '.join(RANGES)}, not {method!r}")
    if width == 0 or (scheme.group_size is not None and width % scheme.group_size):
        raise LlmqError(f"group size {scheme.group_size} does not divide the {width} inputs of the weight")


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest code of every weight: clamp(round(w / scale) + zero).

    weight: any float [out, in]; scale: [out, groups]; zero: int8 [out, groups] or None. Returns int8 [out, in].
    """
    rows, width = weight.shape
    groups = scale.shape[1]
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32).reshape(-1, groups, width // groups)
        part = part / scale[start : start + step].to(torch.float32).unsqueeze(-1)
        part.round_()
        if zero is not None:
            part += zero[start : start + step].unsqueeze(-1)
        codes[start : start + step] = part.clamp_(scheme.qmin, scheme.qmax).flatten(1).to(torch.int8)
    return codes


def _root(importance: Tensor) -> Tensor:
    """The root of the importance [1, groups, size], its mean brought to 1 in each group; all 0 means all equal."""
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0).sqrt_()


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


def _entropy_limit(weight: Tensor, groups: int, bits: int) -> float:
    """Where 'kl' clips, in root mean squares of a group: one figure for the whole weight."""
    histogram = Histogram(weight.device)
    for _, part, _, unit in parts(weight, groups):
        histogram.update(part / unit)
    return histogram.limit(bits)


def _search(groups: _Groups, method: str, limit: float) -> _Best:
    """Min-max or where the method clips, and what searching around it improves."""
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
    """The best of the log-spaced scales and its zero point, judged by what its codes could reach with any scale.

    For codes c − z = k and weights a, Σ a(w − s·k)² is least at s = Σ a·w·k / Σ a·k², where it is
    Σ a·w² − (Σ a·w·k)² / Σ a·k²: two sums tell both the best scale for these codes and its error.
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
        # Level −k of the mirrored grid is level k of the plain one with a negative scale.
        scale, zero = torch.where(zero < 0, -scale, scale), torch.zeros_like(zero)
    return torch.where(scale == 0, top, scale), zero


def _zeros(scheme: Scheme, low: Tensor, high: Tensor, scale: Tensor) -> list[Tensor | float]:
    """Zero points worth trying for a scale: those that share the clip between both ends, more or less.

    Symmetric: 0, and −1 for the mirrored grid, whose levels are those of a zero point of −1.
    """
    if scheme.symmetric:
        if scheme.bits >= SIDED:
            return [(high > -low).to(torch.float32).neg_()]
        return [0.0, -1.0]
    below, above = scheme.qmin - low / scale, scheme.qmax - high / scale
    return [zero.round_().clamp_(scheme.qmin, scheme.qmax) for zero in ((below + above) / 2, below, above)]


def _levels(groups: _Groups, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
    """code − zero of every weight on the grid of `scale` and `zero`, as float32, into `out`."""
    torch.div(groups.weight, scale, out=out).round_()
    return _clip(out, groups.scheme, 0.0 if groups.scheme.symmetric else zero, out)


def _clip(levels: Tensor, scheme: Scheme, zero: Tensor | float, out: Tensor) -> Tensor:
    """The levels that the grid with this zero point has, nearest to those given, into `out`."""
    if isinstance(zero, float):
        return torch.clamp(levels, scheme.qmin - zero, scheme.qmax - zero, out=out)
    # torch.clamp with bounds that are tensors takes four times as long.
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
    """The error of a scale, and the least-squares scale for the codes it chose: both [rows, groups, 1]."""
    levels = _levels(groups, scale, zero, buffer)
    left = torch.addcmul(groups.weight, levels, scale, value=-1, out=other)
    if groups.root is not None:
        left *= groups.root
        levels *= groups.root
    # The correction to the scale is fitted to what the scale left over: no cancellation, even at 8 bits.
    change = torch.mul(left, levels, out=third).sum(-1, keepdim=True)
    size = levels.square_().sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return left.square_().sum(-1, keepdim=True), change.div_(size).add_(scale)
