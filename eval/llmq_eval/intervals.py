"""95 % intervals of measures, and paired tests between two models on the same windows or documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

LEVEL = 0.95


@dataclass(frozen=True)
class Test:
    """A paired difference (first minus second), its 95 % interval, the two-sided p, and the test's name."""

    difference: float
    low: float
    high: float
    p: float
    name: str


def mean(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean and its interval by Student's t; without an interval if there is only one sample."""
    values = np.asarray(samples, dtype=np.float64)
    centre = float(values.mean())
    if len(values) < 2:
        return centre, None, None
    half = _t(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def share(hits: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a fraction; also valid if nearly all or none of `count` documents are hits."""
    z = float(special.ndtri((1 + LEVEL) / 2))
    p = hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def median(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The median and the narrowest interval between two of the samples that holds it with 95 % or more.

    Distribution-free; with fewer than 6 samples there is no such interval.
    """
    values = sorted(samples)
    count = len(values)
    centre = float(np.median(values))
    # Samples i+1 … n−i enclose the median unless at most i samples are on one side of it.
    skipped = -1
    while skipped + 1 < count / 2 and 2 * _at_most(skipped + 1, count) <= 1 - LEVEL:
        skipped += 1
    return (centre, None, None) if skipped < 0 else (centre, values[skipped], values[count - 1 - skipped])


def quantile(values: np.ndarray[Any, Any], level: float, draws: int = 200) -> tuple[float | None, float | None]:
    """The interval of a quantile over all of `values` [windows, positions] by the bootstrap over windows.

    Positions of a window are correlated, so whole windows are resampled. None for a single window.
    """
    windows = len(values)
    if windows < 2:
        return None, None
    order = np.argsort(values, axis=None)
    ordered, window = values.reshape(-1)[order], order // values.shape[1]
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        weights = np.bincount(random.integers(0, windows, windows), minlength=windows)
        reached = np.cumsum(weights[window])
        found.append(float(ordered[np.searchsorted(reached, level * reached[-1])]))
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def paired(first: Sequence[float], second: Sequence[float]) -> Test | None:
    """McNemar's exact test if all samples are 0 or 1, else Student's paired t test.

    None if there are fewer than two pairs.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} samples cannot be paired with {len(b)}")
    if len(a) < 2:
        return None
    difference, low, high = mean((a - b).tolist())
    assert low is not None and high is not None  # two samples or more
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        p = min(1.0, 2 * _at_most(min(gained, lost), gained + lost)) if gained + lost else 1.0
        return Test(difference, low, high, p, "exact McNemar")
    spread = (high - low) / 2 / _t(len(a) - 1)
    if spread == 0:
        return Test(difference, low, high, 1.0 if difference == 0 else 0.0, "paired t")
    p = 2 * float(special.stdtr(len(a) - 1, -abs(difference) / spread))
    return Test(difference, low, high, p, "paired t")


def unpaired(first: Sequence[float], second: Sequence[float]) -> Test:
    """Mann-Whitney's test, for unpaired repeats; the difference is that of the medians."""
    from scipy.stats import mannwhitneyu

    p = float(mannwhitneyu(first, second).pvalue)
    difference = float(np.median(first) - np.median(second))
    return Test(difference, math.nan, math.nan, p, "Mann-Whitney")


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for multiple tests by Holm's method."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


def _at_most(successes: int, trials: int) -> float:
    """The probability of at most `successes` heads in `trials` throws of a fair coin."""
    return float(special.bdtr(successes, trials, 0.5))
