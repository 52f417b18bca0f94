"""Static activation ranges: what the input of a weight looked like over all of calibration, and one scale for it.

A histogram of |x| that grows: it reaches to a power of two, and where a value lies beyond, the reach doubles and every
two bins become one. So the counts are exact, the same as if the final reach had been known, whatever the order the
samples came in; and as the reach is the least power of two that holds the largest value, at least half the bins are in
use. The price: one value far out makes the rest coarse, a bin being at most a 1024th of the largest.
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
"""The least exponent of the reach: below 2^−100 everything is one bin, and float32 can still divide by a bin."""
METHODS = ("minmax", "percentile", "mse", "kl", "aciq")
PARTS = 8
"""Points that stand for a bin where the error of a grid is summed."""
CLIPS = tuple(2 ** (-step / 16) for step in range(145))
"""The clips that 'mse' tries, as shares of the largest magnitude: down to a 512th, 4 % apart."""


class Magnitudes:
    """The histogram of |x| over a whole input, its extremes and moments: a Statistic (see `llmq.block.statistics`).

    counts: int64 [2048], bin j holding j·reach/2048 ≤ |x| < (j+1)·reach/2048; reach: a power of two, 0 before the first
    value that is not 0; low, high: the extremes; total, size, square: Σx, Σ|x|, Σx², float64 []; count: values seen.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.reach = 0.0
        self.low, self.high = math.inf, -math.inf
        self.total, self.size, self.square = torch.zeros(3, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Take in x of any shape and float dtype. Raises LlmqError at values that are not finite."""
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
        """Take in what another has seen: counts and extremes are as though this one had seen it all."""
        device = self.counts.device
        reach = max(self.reach, other.reach)
        self.counts = _folded(self.counts, self.reach, reach) + _folded(other.counts, other.reach, reach).to(device)
        self.reach, self.count = reach, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total = self.total + other.total.to(device)
        self.size = self.size + other.size.to(device)
        self.square = self.square + other.square.to(device)

    def _grow(self, top: float) -> None:
        """Doubles the reach until it lies beyond `top`; every doubling merges two bins into one."""
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
        """Memory that it holds, in bytes."""
        return 8 * BINS + 3 * 8


def find_activation_scale(
    statistic: Magnitudes, method: str = "minmax", grid: str = "int", percentile: float = 99.99
) -> Tensor:
    """The scale of a whole input, float32 [1], positive and finite: its clip over 127.5 (int8) or 448 (float8_e4m3fn).

    method: 'minmax': the largest magnitude; 'percentile': that share of the values is covered; 'mse': least squared
    error of rounding, over clips 4 % apart; 'kl': TensorRT's, see `entropy`; 'aciq': Banner et al. 2018
    (arXiv:1810.05723), the clip of least expected error under the likelier of Laplace and normal, for fp8 found by
    integrating that density. None reaches beyond the largest magnitude. grid: 'int' or 'fp8'. An input that was 0
    throughout has scale 1. Raises LlmqError at an unknown method or grid, or where nothing was seen.
    """
    if method not in METHODS:
        raise LlmqError(f"the range of activations must be one of {', '.join(METHODS)}, not {method!r}")
    limits = inputs_of(grid)
    if not 0 < percentile <= 100:
        raise LlmqError(f"percentile must lie above 0 and not above 100, not {percentile!r}")
    if statistic.count == 0:
        raise LlmqError("nothing passed through this weight in calibration: use dynamic activation scales")
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
    # At reach 0 only zeros came, all in the first bin, which is theirs whatever the reach.
    for _ in range(round(math.log2(needed / reach)) if reach else 0):
        counts = torch.cat([counts.view(-1, 2).sum(1), counts.new_zeros(BINS // 2)])
    return counts


def _percentile(counts: Tensor, reach: float, share: float) -> float:
    """Below which a share of the values lies, linear within its bin."""
    below = counts.cumsum(0)
    wanted = share * float(below[-1])
    place = min(int(torch.searchsorted(below, wanted)), BINS - 1)
    inside = 1 - (float(below[place]) - wanted) / max(float(counts[place]), 1.0)
    return (place + inside) * reach / BINS


def _least_error(counts: Tensor, reach: float, top: float, grid: str) -> float:
    """The clip of least Σ(x − x̂)², each bin standing for PARTS values spread over it."""
    # In units of the reach: nothing overflows when squared.
    value = (torch.arange(BINS * PARTS, dtype=torch.float32) + 0.5) / (BINS * PARTS)
    weight = counts.to(torch.float32).repeat_interleave(PARTS) / counts.sum()
    # The signs are not known: as many values are taken to lie below 0 as above.
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
    """The clip of least divergence: at least 128 bins are kept, as many as int8 has magnitudes."""
    used = min(int(top * BINS / reach) + 1, BINS)
    kept = torch.arange(min(128, used), used + 1)
    rounding, limits = rounding_of(find(grid)), inputs_of(grid)
    if rounding.even:
        cells = even_cells(kept, BINS, 128)
    else:
        # Cells that widen outwards: the bins that round to one value share a cell.
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
