"""Static activation ranges: the distribution of a weight's input over all of calibration, and one scale for it.

A histogram of |x| that grows: its range (`reach`) is a power of two; if a value exceeds it, the range doubles and every
two bins are merged. So the counts are exact, as if the final range had been known from the start, for any order of the
samples. The range is the smallest power of two above the largest value, so at least half the bins are used. A single
outlier makes the bins coarse: a bin is at most 1/1024 of the largest value.
"""

from __future__ import annotations

import functools
import math
from typing import Self

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.activations import round_static
from llmq.grids.base import rounding_of
from llmq.grids.entropy import entropy_clip, even_cells
from llmq.grids.estimators import LAPLACE, laplace_clip, normal_clip
from llmq.grids.table import find, inputs_of

BINS = 2048
PIECE = 1 << 20
SMALLEST = -100
"""The smallest exponent of the reach: values below 2^−100 share one bin; float32 can still divide by a bin's width."""
METHODS = ("minmax", "percentile", "mse", "kl", "aciq")
PARTS = 8
"""Sample points per bin for the sum of a grid's error."""
CLIPS = tuple(2 ** (-step / 16) for step in range(145))
"""The candidate clips of 'mse', as fractions of the largest magnitude: down to 1/512, in steps of 4 %."""


class Magnitudes:
    """The histogram of |x| over a whole input, its extremes and moments: a Statistic (see `llmq.block.statistics`).

    counts: int64 [2048], bin j counts j·reach/2048 ≤ |x| < (j+1)·reach/2048; reach: a power of two, 0 before the first
    nonzero value; low, high: the extremes; total, size, square: Σx, Σ|x|, Σx², float64 []; count: values seen.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.reach = 0.0
        self.low, self.high = math.inf, -math.inf
        self.total, self.size, self.square = torch.zeros(3, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add x of any shape and float dtype. Raises LlmqError if a value is not finite."""
        flat = x.detach().reshape(-1)
        for start in range(0, len(flat), PIECE):
            self._take(flat[start : start + PIECE].to(torch.float32))

    def _take(self, x: Tensor) -> None:
        low, high = (float(edge) for edge in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LlmqError("an input of the weight holds values that are not finite: no static scale can be found")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(high, -low))
        size = x.abs()
        place = (size * (BINS / self.reach if self.reach else 0.0)).to(torch.int64)
        self.counts += torch.bincount(place, minlength=BINS)
        self.total += x.sum(dtype=torch.float64)
        self.size += size.sum(dtype=torch.float64)
        self.square += x.to(torch.float64).square_().sum()
        self.count += len(x)

    def merge(self, other: Self) -> None:
        """Add the values of another one: counts and extremes are as if this one had seen all of them."""
        device = self.counts.device
        reach = max(self.reach, other.reach)
        self.counts = _folded(self.counts, self.reach, reach) + _folded(other.counts, other.reach, reach).to(device)
        self.reach, self.count = reach, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total = self.total + other.total.to(device)
        self.size = self.size + other.size.to(device)
        self.square = self.square + other.square.to(device)

    def _grow(self, top: float) -> None:
        """Double the reach until it exceeds `top`; every doubling merges two bins into one."""
        if top == 0:
            return
        needed = math.ldexp(1.0, max(math.frexp(top)[1], SMALLEST))
        reach = max(self.reach, needed)
        self.counts, self.reach = _folded(self.counts, self.reach, reach), reach

    @property
    def top(self) -> float:
        """The largest magnitude seen; 0 before the first value."""
        return max(self.high, -self.low, 0.0)

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors, in bytes."""
        return 8 * BINS + 3 * 8


def find_activation_scale(
    statistic: Magnitudes, method: str = "minmax", grid: str = "int", percentile: float = 99.99
) -> Tensor:
    """The scale of a whole input, float32 [1], positive and finite: its clip over 127.5 (int8) or 448 (float8_e4m3fn).

    method: 'minmax': the largest magnitude; 'percentile': that percentage of the values is not clipped; 'mse': least
    squared rounding error, over clips in steps of 4 %; 'kl': TensorRT's, see `entropy`; 'aciq': Banner et al. 2018
    (arXiv:1810.05723), the clip of least expected error under the more likely of a Laplace and a normal distribution,
    for fp8 by numerical integration. No clip exceeds the largest magnitude. grid: 'int' or 'fp8'. An input of only
    zeros has scale 1. Raises LlmqError for an unknown method or grid, or if there are no values.
    """
    if method not in METHODS:
        raise LlmqError(f"the range of activations must be one of {', '.join(METHODS)}, not {method!r}")
    limits = inputs_of(grid)
    if not 0 < percentile <= 100:
        raise LlmqError(f"percentile must lie above 0 and not above 100, not {percentile!r}")
    if statistic.count == 0:
        raise LlmqError("this weight had no input during calibration: use dynamic activation scales")
    clip = top = statistic.top
    if top == 0:
        return torch.ones(1)
    counts = statistic.counts.to("cpu", torch.float64)
    if method == "percentile":
        clip = _percentile(counts, statistic.reach, percentile / 100)
    elif method == "mse":
        clip = _least_error(counts, statistic.reach, top, grid)
    elif method == "kl":
        clip = _entropy(counts, statistic.reach, top, grid)
    elif method == "aciq":
        clip = _analytic(statistic, grid)
    scale = (min(clip, top) if clip > 0 else top) / limits.divisor
    return torch.tensor([scale], dtype=torch.float32).clamp_min_(torch.finfo(torch.float32).tiny)


def _folded(counts: Tensor, reach: float, needed: float) -> Tensor:
    """A histogram's counts over a larger reach, both powers of two: every doubling merges two bins into one."""
    # At reach 0 there were only zeros; they are in the first bin for any reach.
    for _ in range(round(math.log2(needed / reach)) if reach else 0):
        counts = torch.cat([counts.view(-1, 2).sum(1), counts.new_zeros(BINS // 2)])
    return counts


def _percentile(counts: Tensor, reach: float, share: float) -> float:
    """The value below which a fraction of the values lies, linear within its bin."""
    below = counts.cumsum(0)
    wanted = share * float(below[-1])
    place = min(int(torch.searchsorted(below, wanted)), BINS - 1)
    inside = 1 - (float(below[place]) - wanted) / max(float(counts[place]), 1.0)
    return (place + inside) * reach / BINS


def _least_error(counts: Tensor, reach: float, top: float, grid: str) -> float:
    """The clip of least Σ(x − x̂)², with PARTS evenly spaced sample points per bin."""
    # In units of the reach, so that squares do not overflow.
    value = (torch.arange(BINS * PARTS, dtype=torch.float32) + 0.5) / (BINS * PARTS)
    weight = counts.to(torch.float32).repeat_interleave(PARTS) / counts.sum()
    # Signs are not recorded: half of the values are assumed to be negative.
    both = torch.stack([value, -value])
    best, found = math.inf, top
    for share in CLIPS:
        scale = torch.tensor(top / reach * share / inputs_of(grid).divisor)
        left = both - round_static(both, scale, grid)
        error = float((left.square_() * weight).sum(dtype=torch.float64))
        if error < best:
            best, found = error, top * share
    return found


def _entropy(counts: Tensor, reach: float, top: float, grid: str) -> float:
    """The clip of least divergence; it keeps at least 128 bins, the number of int8's magnitudes."""
    used = min(int(top * BINS / reach) + 1, BINS)
    kept = torch.arange(min(128, used), used + 1)
    rounding, limits = rounding_of(find(grid)), inputs_of(grid)
    if rounding.even:
        cells = even_cells(kept, BINS, 128)
    else:
        # Bins that round to the same value share a cell; cells are wider at larger values.
        middle = (torch.arange(BINS) + 0.5)[None] / kept[:, None] * limits.high
        values = rounding.round_input(middle.clamp_(max=limits.high))
        cells = torch.searchsorted(torch.unique(values), values)
    keep = int(kept[entropy_clip(counts, kept, cells)])
    return top if keep == used else keep * reach / BINS


def _analytic(statistic: Magnitudes, grid: str) -> float:
    """Banner et al.'s clip around 0, as the grid is symmetric."""
    mean = float(statistic.size) / statistic.count
    deviation = math.sqrt(float(statistic.square) / statistic.count)
    laplace = mean < LAPLACE * deviation
    size = mean if laplace else deviation
    if rounding_of(find(grid)).even:
        return size * (laplace_clip(8) if laplace else normal_clip(8))
    return size * _integrated(laplace, grid)


@functools.cache
def _integrated(laplace: bool, grid: str) -> float:
    """The clip of least expected error on a grid, in units of b (Laplace) or σ (normal), by integration."""
    reach = 32.0
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) * reach / BINS
    counts = torch.exp(-middle if laplace else -middle.square() / 2)
    return _least_error(counts, reach, reach, grid)
