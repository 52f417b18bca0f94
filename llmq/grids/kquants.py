"""Two levels of scales, as in llama.cpp's K-quants: a float16 scale for 256 inputs, and a whole multiple of it for each
16 or 32 of them; with 2, 4 and 5 bits also a float16 minimum, and its multiples.

    w ≈ d · s · q                    3 bits: s from −32 to 31; 6 bits: from −128 to 127; q signed; groups of 16
    w ≈ d · s · q − e · m            2 bits: s, m up to 15, groups of 16; 4 and 5 bits: up to 63, groups of 32; q from 0

(ggml-common.h, block_q2_K to block_q6_K.) For a solver these are scales d · s and zero points e · m / (d · s), which
are no whole numbers here. Both are found for the 256 inputs together: first the best of each group by itself; then, of
some float16 numbers, the one with whose multiples the error is the least; then the neighbours of each multiple, and
both float16 numbers by least squares, as long as the error falls. No result is worse than that of 'minmax'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import READ, Quantized, QuantizedWeight, Units, check_range, parts, weights_of
from llmq.grids.half_scales import HalfInteger
from llmq.grids.integer import Integer
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme

MULTIPLES = {2: (1, 15), 3: (-32, 31), 4: (1, 63), 5: (1, 63), 6: (-128, 127)}
"""Bits → the smallest and the largest multiple of d; 0 is left out, as no scale is 0. Those of e are from 0 on."""
SMALLEST, LARGEST = 2.0**-24, 65504.0
"""The smallest number of float16 above 0, and the largest."""
SIXTEENTHS = range(16, 8, -1)
"""What the largest scale's multiple is tried to be, in parts of the largest one there is."""
ROUNDS = 2
LEAST_SHARE = 1e-6
"""Of the mean importance."""
TINY = torch.finfo(torch.float32).tiny


class Levels(NamedTuple):
    """Scales of two levels. whole: int8 [out, groups], multiples of d; d: float16 [out, blocks]; lowest, e: the same
    of minima, or None."""

    whole: Tensor
    d: Tensor
    lowest: Tensor | None = None
    e: Tensor | None = None

    def scale(self) -> Tensor:
        """d · s, float32 [out, groups]: exact."""
        return _times(self.whole, self.d)

    def minimum(self) -> Tensor | None:
        """e · m, float32 [out, groups]: exact."""
        return None if self.lowest is None or self.e is None else _times(self.lowest, self.e)


@dataclass(frozen=True, eq=False)
class KWeight:
    """A weight [out, in] as it is stored. codes: int8 [out, in]: q; levels: its scales; notes: for the report."""

    codes: Tensor
    levels: Levels
    scheme: Scheme
    notes: tuple[str, ...] = ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in]: d · s · q − e · m, rounded to float32, and then to `dtype`."""
        rows, width = self.codes.shape
        scale, minimum = self.levels.scale(), self.levels.minimum()
        weight = torch.empty(rows, width, dtype=dtype, device=self.codes.device)
        step = max(1, READ // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            value = self.codes[part].to(torch.float32).view(-1, scale.shape[1], width // scale.shape[1])
            value *= scale[part].unsqueeze(-1)
            if minimum is not None:
                value -= minimum[part].unsqueeze(-1)
            weight[part] = value.flatten(1)
        return weight


class KQuant(Integer):
    """See `Rounding`: scales and zero points are float32; `stored_scale` is the `Levels` that they are made of."""

    apart = False
    scale_dtype = torch.float32
    zero_dtype = torch.float32

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: from 0 on where there are minima."""
        lowest, highest = self.ranks(scheme)
        return torch.arange(lowest, highest + 1, dtype=torch.float32, device=device)

    def ranks(self, scheme: Scheme) -> tuple[int, int]:
        """See `Rounding.ranks`."""
        return (scheme.qmin, scheme.qmax) if scheme.symmetric else (0, 2**scheme.bits - 1)

    def whole(self, scheme: Scheme) -> tuple[int, int] | None:
        """See `Rounding.whole`."""
        return self.ranks(scheme) if scheme.symmetric else None

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: zero points are no whole numbers, so they are added first."""
        if zero is not None:
            scaled += zero
        return scaled.round_().clamp_(*self.ranks(scheme))

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: what `settle` finds again; zero points are float32."""
        rows, width = weight.shape
        check_range(method, scheme, width)
        span = scheme.rules.span
        if width % span:
            raise LlmqError(f"{scheme} has scales of {span} inputs, which do not divide the {width} of the weight")
        groups = scheme.groups(width)
        root = weights_of(method, importance, width // span)
        even = torch.ones(1, width // span, span, device=weight.device)
        # Inputs that are always 0 count a little, or a group of them would have no best scale.
        shares = even if root is None else root.square().clamp_min_(LEAST_SHARE)
        scale = torch.empty(rows, groups, device=weight.device)
        zero = None if scheme.symmetric else torch.empty_like(scale)
        for part in parts(weight, groups):
            blocks = _Blocks(part.weight, shares, scheme)
            found = blocks.plain() if method == "minmax" else blocks.search(method, importance)
            scale[part.rows] = found.scale.flatten(1)
            if zero is not None:
                zero[part.rows] = (found.minimum / found.scale).flatten(1)
        return scale, zero

    def settle(self, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None, Levels]:
        """See `Rounding.settle`: the multiples that are nearest; of what `find_scale` found, these are its own."""
        count = scheme.rules.span // (scheme.group_size or 1)
        whole, d = _multiples(scale.view(len(scale), -1, count), MULTIPLES[scheme.bits])
        if zero is None:
            found = Levels(whole, d)
            return found.scale(), None, found
        minimum = (zero * scale).clamp_(min=0).view(len(scale), -1, count)
        found = Levels(whole, d, *_multiples(minimum, (0, MULTIPLES[scheme.bits][1])))
        settled, lowest = found.scale(), found.minimum()
        assert lowest is not None
        return settled, lowest / settled, found

    def units(self, weight: QuantizedWeight) -> Units | None:
        """See `Rounding.units`."""
        if not isinstance(weight.stored_scale, Levels):
            return None
        d, e = weight.stored_scale.d, weight.stored_scale.e
        count = weight.scale.shape[1] // d.shape[1]
        scale, minimum = (
            None if unit is None else unit.to(torch.float32).repeat_interleave(count, 1) for unit in (d, e)
        )
        assert scale is not None
        limits = MULTIPLES[weight.scheme.bits]
        return Units(scale, limits, minimum, limits[1])

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> KWeight:
        """See `Rounding.finish`. Raises LlmqError if the two levels of its scales are missing."""
        if not isinstance(weight.stored_scale, Levels):
            raise LlmqError(f"a {weight.scheme} weight needs the two levels of its scales: round it by `rounded_on`")
        return KWeight(weight.codes, weight.stored_scale, weight.scheme, weight.notes)

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """See `Rounding.reopen`."""
        if not isinstance(weight, KWeight):
            return super().reopen(weight)
        scale, minimum = weight.levels.scale(), weight.levels.minimum()
        zero = None if minimum is None else minimum / scale
        return QuantizedWeight(weight.codes, scale, zero, weight.scheme, weight.notes, stored_scale=weight.levels)


class BlockInteger(HalfInteger):
    """Whole numbers with a float16 scale in a model of any dtype: llama.cpp's simpler blocks, for other widths."""

    scale_dtype = torch.float32

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`."""
        return super().find_scale(weight, scheme, method, importance, torch.float32)


class _Found(NamedTuple):
    """Float16 numbers [rows, blocks, 1, 1] and their multiples [rows, blocks, groups, 1], all as float32; error: of
    each block [rows, blocks, 1, 1]."""

    d: Tensor
    whole: Tensor
    e: Tensor
    lowest: Tensor
    error: Tensor

    @property
    def scale(self) -> Tensor:
        return self.d * self.whole

    @property
    def minimum(self) -> Tensor:
        return self.e * self.lowest


class _Blocks:
    """Some rows while their scales are found: weights and shares are float32 [rows, blocks, groups, size]."""

    def __init__(self, weight: Tensor, shares: Tensor, scheme: Scheme) -> None:
        blocks = shares.shape[1]
        self.weight = torch.unflatten(weight, 1, (blocks, -1))
        self.shares = shares.reshape(1, *self.weight.shape[1:])
        self.scheme, self.limits = scheme, MULTIPLES[scheme.bits]
        self.ends = (scheme.qmin, scheme.qmax) if scheme.symmetric else (0, 2**scheme.bits - 1)

    def plain(self) -> _Found:
        """From the lowest to the highest weight of each group, with the largest multiple for the largest scale."""
        low, high = self.weight.amin(-1, keepdim=True), self.weight.amax(-1, keepdim=True)
        if self.scheme.symmetric:
            scale, minimum = torch.maximum(high, -low) * (2 / (2**self.scheme.bits - 1)), torch.zeros_like(low)
        else:
            minimum = -low.clamp(max=0)
            scale = (high.clamp(min=0) + minimum) / (2**self.scheme.bits - 1)
        return self._judged(*self._scales(scale, 16), *self._minima(minimum, 16))

    def search(self, method: str, importance: Tensor | None) -> _Found:
        """The scales of least error that are found."""
        scheme, best = self.scheme, self.plain()
        alone = Scheme(scheme.bits, scheme.group_size, scheme.symmetric)
        found, zero = find_range(self.weight.flatten(1), alone, method, importance, torch.float32)
        scale = torch.where(self.weight.any(-1, keepdim=True), found.view(best.whole.shape), 0.0)
        minimum, others = torch.zeros_like(scale), SIXTEENTHS[:1]
        if zero is not None:
            minimum, others = (zero.view(scale.shape).to(torch.float32) - scheme.qmin) * scale, SIXTEENTHS[:5:2]
            scale, minimum = self._fitted(scale, minimum)
        for part in SIXTEENTHS:
            d, whole = self._scales(scale, part)
            near = self._refitted(d * whole, minimum)
            for other in others:
                best = _better(best, self._judged(d, whole, *self._minima(near, other)))
        for _ in range(ROUNDS):
            best = self._again(self._neighbours(best))
        return best

    def _judged(self, d: Tensor, whole: Tensor, e: Tensor, lowest: Tensor) -> _Found:
        """With its error."""
        return _Found(d, whole, e, lowest, self._error(d * whole, e * lowest).sum(2, keepdim=True))

    def _neighbours(self, best: _Found) -> _Found:
        """Each group's multiples changed by one, if that is better: a minimum follows its scale."""
        whole, lowest = best.whole, best.lowest
        least = self._error(best.scale, best.minimum)
        for step in (0, 1, -1):
            tried = self._whole(best.whole + step, step or 1)
            near = lowest
            if not self.scheme.symmetric:
                near = self._lowest(self._refitted(best.d * tried, best.minimum) / best.e)
            error = self._error(best.d * tried, best.e * near)
            better = error < least
            whole, lowest = torch.where(better, tried, whole), torch.where(better, near, lowest)
            least = torch.where(better, error, least)
        return best._replace(whole=whole, lowest=lowest, error=least.sum(2, keepdim=True))

    def _again(self, best: _Found) -> _Found:
        """Both float16 numbers of a block by least squares, all codes and multiples fixed, if that is better."""
        across = self._points(best.scale, best.minimum) * best.whole
        below = None if self.scheme.symmetric else -best.lowest.expand_as(across)
        d, e = _solve(self.shares, self.weight, across, below, (2, 3))
        usable = (d * best.d > 0) & (e >= 0)
        d, e = torch.where(usable, _half(d), best.d), torch.where(usable, _half(e), best.e)
        return _better(best, self._judged(d, best.whole, e, best.lowest))

    def _scales(self, scale: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """A float16 number and multiples of it, of which the largest is about part/16 of the largest there is."""
        limit = min(self.limits) if self.scheme.symmetric else self.limits[1]
        at = scale.abs().argmax(2, keepdim=True)
        d = _half(scale.gather(2, at) / round(limit * part / 16))
        d = torch.where(d == 0, 1.0, d)
        return d, self._whole((scale / d).round_(), 1)

    def _whole(self, multiples: Tensor, instead: int) -> Tensor:
        """Those that there are; `instead` of 0."""
        kept = multiples.clamp(*self.limits)
        return torch.where(kept == 0, instead, kept)

    def _minima(self, minimum: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """The same of minima, whose smallest multiple is 0."""
        e = _half(minimum.amax(2, keepdim=True) / round(self.limits[1] * part / 16))
        return e, self._lowest(minimum / e)

    def _lowest(self, multiples: Tensor) -> Tensor:
        return multiples.nan_to_num_(0, 0, 0).round_().clamp_(0, self.limits[1])

    def _points(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The codes of every weight, as float32."""
        lowest, highest = self.ends
        return ((self.weight + minimum) / scale).round_().clamp_(lowest, highest)

    def _error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Σ share · (w − ŵ)² of each group [rows, blocks, groups, 1]."""
        value = self._points(scale, minimum).mul_(scale).sub_(minimum)
        return value.sub_(self.weight).square_().mul_(self.shares).sum(-1, keepdim=True)

    def _refitted(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The best real minimum of each group for the codes that it has with this scale; 0 or more."""
        if self.scheme.symmetric:
            return minimum
        left = self._points(scale, minimum).mul_(scale).sub_(self.weight).mul_(self.shares).sum(-1, keepdim=True)
        return left.div_(self.shares.sum(-1, keepdim=True)).clamp_(min=0)

    def _fitted(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """The best real scale and minimum of each group for its codes, found again a few times."""
        least = self._error(scale.clamp_min(TINY), minimum)
        ones = torch.ones_like(self.weight)
        for _ in range(ROUNDS):
            codes = self._points(scale.clamp_min(TINY), minimum)
            first, second = _solve(self.shares, self.weight, codes, -ones, (3,))
            error = self._error(first.clamp_min(TINY), second)
            better = (error < least) & (first > 0) & (second >= 0)
            scale, minimum = torch.where(better, first, scale), torch.where(better, second, minimum)
            least = torch.where(better, error, least)
        return scale, minimum


def _better(best: _Found, new: _Found) -> _Found:
    """The better of two, for each block."""
    better = new.error < best.error
    return _Found(*(torch.where(better, mine, old) for mine, old in zip(new, best, strict=True)))


def _solve(
    shares: Tensor, weight: Tensor, first: Tensor, second: Tensor | None, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """a and b of the least Σ share · (w − a · first − b · second)² along some axes; 0 where they are not determined."""

    def total(one: Tensor, other: Tensor) -> Tensor:
        return (one * other * shares).sum(axes, keepdim=True)

    along, size = total(first, weight), total(first, first)
    if second is None:
        return (along / size).nan_to_num_(0, 0, 0), torch.zeros_like(along)
    across, other, both = total(second, weight), total(second, second), total(first, second)
    whole = size * other - both.square()
    a, b = (other * along - both * across) / whole, (size * across - both * along) / whole
    return a.nan_to_num_(0, 0, 0), b.nan_to_num_(0, 0, 0)


def _times(whole: Tensor, unit: Tensor) -> Tensor:
    """Multiples int8 [out, groups] of float16 numbers [out, blocks], float32."""
    rows, blocks = unit.shape
    return (whole.view(rows, blocks, -1).to(torch.float32) * unit.to(torch.float32).unsqueeze(-1)).view(rows, -1)


def _multiples(values: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whole multiples int8 [rows, groups] of float16 numbers [rows, blocks] that are near to values.

    values: float32 [rows, blocks, groups]; limits: of the multiples. Of all numbers of which the largest value is a
    multiple, the one that leaves the least error: none, where all values are multiples of one.
    """
    lowest, highest = limits
    top = values.gather(2, values.abs().argmax(2, keepdim=True))
    best = torch.zeros_like(top)
    least = torch.full_like(top, torch.inf)
    several = [k for k in range(lowest, highest + 1) if k]
    for k in sorted(several, key=abs, reverse=True):
        unit = _half(top / k)
        near = (values / unit).nan_to_num_(0, 0, 0).round_().clamp_(lowest, highest)
        error = near.mul_(unit).sub_(values).square_().sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, unit, best), torch.where(better, error, least)
        if not bool(least.any()):
            break
    whole = (values / best).nan_to_num_(0, 0, 0).round_().clamp_(lowest, highest)
    if lowest != 0:
        whole = torch.where(whole == 0, 1, whole)
    return whole.to(torch.int8).flatten(1), best.squeeze(2).to(torch.float16)


def _half(numbers: Tensor) -> Tensor:
    """The nearest number of float16, float32 of any shape: finite; 0 only for 0."""
    size = numbers.abs().clamp(SMALLEST, LARGEST).to(torch.float16).to(torch.float32)
    return torch.where(numbers == 0, 0.0, torch.copysign(size, numbers))
