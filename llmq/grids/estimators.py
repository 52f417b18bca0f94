"""Clipping bounds of a group of weights without a search: percentile, entropy ('kl') and analytic ('aciq').

Each gives the lowest and highest value that the grid must cover; scale and zero point follow as for min-max. None goes
beyond min-max, and if an estimated range is empty (most of a group 0, or all values equal), min-max is used.

A group has few samples, 32 to a few thousand. `percentile` interpolates between neighbouring ranks, so in a small group
it gives slightly less than the maximum. `kl` needs a histogram, for which 128 samples are too few: all groups of the
weight, each divided by its root mean square, share one histogram, and its clip is scaled back by each group's root mean
square. `aciq` needs only two moments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmq.grids.entropy import entropy_clip, even_cells

CLIPPED = ("percentile", "kl", "aciq")
PERCENTILE = {2: 91.0, 3: 97.0, 4: 99.0, 5: 99.7, 6: 99.9, 7: 99.97, 8: 99.99}
"""Percent of weights not clipped, by bits: about that of a normal distribution's best clip (see `normal_clip`)."""
BINS = 2048
REACH = 16.0
"""The range of the shared histogram of 'kl', in root mean squares; larger values count in its last bin."""
STRIDE = 16
"""Bins between two candidate clips of 'kl': an eighth of a root mean square."""


def clip_bounds(
    weight: Tensor, method: str, bits: int, symmetric: bool, limit: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The lowest and highest value to cover, each float32 [..., 1], for groups [..., size] of finite float32.

    method: one of CLIPPED; limit: for 'kl', the result of `Histogram.limit`, in root mean squares of a group.
    Symmetric: the lowest is minus the highest. Always low ≤ 0 ≤ high, within min-max; both are 0 only if the whole
    group is.
    """
    bottom, top = weight.amin(-1, keepdim=True).clamp_(max=0), weight.amax(-1, keepdim=True).clamp_(min=0)
    if symmetric:
        top = torch.maximum(top, -bottom)
        bottom = -top
    if method == "percentile":
        low, high = _percentile(weight, PERCENTILE[bits] / 100, symmetric)
    elif method == "kl":
        high = rms(weight) * limit
        low = -high
    else:
        low, high = _analytic(weight, bits, symmetric)
    low, high = torch.maximum(low, bottom).clamp_(max=0), torch.minimum(high, top).clamp_(min=0)
    # An almost empty range (most of the group is 0) would give every weight the same code.
    fits = high - low > (top - bottom) * 1e-3
    return torch.where(fits, low, bottom), torch.where(fits, high, top)


def rms(weight: Tensor) -> Tensor:
    """The root mean square of every group [..., size], as [..., 1]."""
    return weight.square().mean(-1, keepdim=True).sqrt_()


class Histogram:
    """The shared histogram of 'kl': |w| of every group in units of the group's root mean square."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64, device=device)

    def update(self, weight: Tensor) -> None:
        """Add groups, float32 [..., size]; groups of zeros are left out."""
        size = rms(weight)
        # The smallest normal number: a group of zeros divided by it stays 0.
        ratio = weight.abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
        ratio = ratio[(size > 0).expand_as(weight)]
        place = ratio.mul_(BINS / REACH).clamp_(max=BINS - 1).to(torch.int64)
        self.counts += torch.bincount(place, minlength=BINS).to(torch.float64)

    def limit(self, bits: int) -> float:
        """The clip of least divergence for a grid with `bits`, in root mean squares; inf means no clipping."""
        levels = 1 << (bits - 1)
        kept = torch.arange(max(levels, STRIDE), BINS + 1, STRIDE, device=self.counts.device)
        found = int(kept[entropy_clip(self.counts, kept, even_cells(kept, BINS, levels))])
        return math.inf if found == BINS else found * REACH / BINS


@functools.cache
def laplace_clip(bits: int) -> float:
    """The clip of least expected squared error, in units of b = E|x − μ|, of a Laplace distribution.

    The error 2b²·e^(−α/b) + α²/(3·4^bits) (Banner et al. 2018, arXiv:1810.05723, §3, eq. for Laplace) is minimal at
    (α/b)·e^(α/b) = 3·4^bits: 2.83, 3.89, 5.03 for 2, 3, 4 bits.
    """
    return _root(lambda a: a - 3 * 4**bits * math.exp(-a))


@functools.cache
def normal_clip(bits: int) -> float:
    """The clip of least expected squared error, in units of σ, of a normal distribution.

    The zero of the derivative of their error, 2α·erfc(α/√2) − 4φ(α) + 2α/(3·4^bits): 1.71, 2.15, 2.55, 2.93 for 2 to 5
    bits.
    """
    density = 4 / math.sqrt(2 * math.pi)
    return _root(lambda a: 2 * a * math.erfc(a / math.sqrt(2)) - density * math.exp(-a * a / 2) + 2 * a / (3 * 4**bits))


LAPLACE = math.sqrt(math.pi / (2 * math.e))
"""Below this E|x − μ| / σ (0.760) a Laplace distribution (0.707) is more likely than a normal one (0.798)."""


def _analytic(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Banner et al.'s clip around the mean (around 0 when symmetric), for the more likely of the two distributions."""
    middle = torch.zeros_like(weight[..., :1]) if symmetric else weight.mean(-1, keepdim=True)
    away = weight - middle
    mean, deviation = away.abs().mean(-1, keepdim=True), rms(away)
    reach = torch.where(mean < LAPLACE * deviation, laplace_clip(bits) * mean, normal_clip(bits) * deviation)
    return middle - reach, middle + reach


def _percentile(weight: Tensor, kept: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The quantiles that enclose a fraction `kept`, with equal tails; those of |w| if symmetric."""
    if symmetric:
        high = _quantile(weight.abs().sort(-1).values, kept)
        return -high, high
    ranked = weight.sort(-1).values
    return _quantile(ranked, (1 - kept) / 2), _quantile(ranked, (1 + kept) / 2)


def _quantile(ranked: Tensor, share: float) -> Tensor:
    """The quantile of sorted values [..., size], linear between neighbours; torch.quantile takes 16 million at most."""
    place = share * (ranked.shape[-1] - 1)
    below = min(int(place), ranked.shape[-1] - 1)
    above = min(below + 1, ranked.shape[-1] - 1)
    return torch.lerp(ranked[..., below : below + 1], ranked[..., above : above + 1], place - below)


def _root(rising: Callable[[float], float]) -> float:
    """The root of a function that is negative at 0.5 and positive at 40, by bisection."""
    low, high = 0.5, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return low
