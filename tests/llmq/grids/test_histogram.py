"""Static activation ranges: the histogram is numpy's, and every scale what the raw samples say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.block.statistics import Statistic
from llmq.errors import LlmqError
from llmq.grids.activations import round_static
from llmq.grids.estimators import laplace_clip, normal_clip
from llmq.grids.histogram import BINS, METHODS, Magnitudes, find_activation_scale
from llmq.grids.table import inputs_of

CPU = torch.device("cpu")


def gathered(*batches: Tensor) -> Magnitudes:
    statistic = Magnitudes(batches[0].shape[-1], CPU)
    for batch in batches:
        statistic.update(batch)
    return statistic


def sample(seed: int, outliers: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = generator.laplace(0.1, 1.0, (40, 16, 64))
    if outliers:
        x[::7, 3, 5] *= 60
    return x.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-126, 120), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_counts_are_numpys_whatever_came_first(powers: list[float], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-13, 13) if dtype == torch.float16 else (-126, 120)
    batches = [torch.randn(3, 5, 8, generator=generator) * 2.0 ** min(max(p, low), high) for p in powers]
    batches = [batch.to(dtype) for batch in batches]
    statistic = gathered(*batches)
    values = torch.cat([b.float().flatten() for b in batches]).double().numpy()
    reach = statistic.reach
    assert math.frexp(reach)[0] == 0.5
    assert np.abs(values).max() < reach and (np.abs(values).max() >= reach / 2 or reach == 2.0**-100)
    assert np.array_equal(
        statistic.counts.numpy(), np.bincount(np.floor(np.abs(values) / reach * BINS).astype(int), minlength=BINS)
    )
    assert (statistic.low, statistic.high) == (values.min(), values.max()) and statistic.count == values.size
    for got, want in ((statistic.total, values), (statistic.size, abs(values)), (statistic.square, values**2)):
        assert float(got) == pytest.approx(want.sum(), rel=1e-5, abs=1e-5 * abs(values).max())


def test_it_is_a_statistic_and_zeros_come_first() -> None:
    kind: type[Statistic] = Magnitudes
    assert kind.nbytes(4096) < 20_000
    statistic = gathered(torch.zeros(4, 8))
    assert float(find_activation_scale(statistic)) == 1
    statistic.update(torch.full((2, 8), 5.0))
    assert int(statistic.counts[0]) == 32 and int(statistic.counts.sum()) == 48 and statistic.reach == 8
    statistic.update(torch.empty(0, 8))
    assert statistic.count == 48


@pytest.mark.parametrize("grid", ["int", "fp8"])
@pytest.mark.parametrize("q", [99.0, 99.9, 99.99, 99.999])
def test_minmax_and_percentile_are_numpys(q: float, grid: str) -> None:
    x = sample(0, outliers=True)
    statistic = gathered(*torch.from_numpy(x))
    assert float(find_activation_scale(statistic, "minmax", grid)) == pytest.approx(
        np.abs(x).max() / inputs_of(grid).divisor
    )
    got = float(find_activation_scale(statistic, "percentile", grid, q)) * inputs_of(grid).divisor
    assert got == pytest.approx(np.percentile(np.abs(x), q, method="inverted_cdf"), abs=1.01 * statistic.reach / BINS)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("grid", ["int", "fp8"])
def test_mse_is_the_best_of_a_search_over_the_raw_samples(grid: str, outliers: bool) -> None:
    x = torch.from_numpy(sample(1, outliers))
    scale = find_activation_scale(gathered(*x), "mse", grid)

    def error(scale: float) -> float:
        return float((x.double() - round_static(x, torch.tensor(scale), grid).double()).square().mean())

    top = float(x.abs().max()) / inputs_of(grid).divisor
    least = min(error(top * share) for share in np.geomspace(0.05, 1, 150))
    assert error(float(scale)) < 1.02 * least
    assert not (outliers and grid == "int") or error(float(scale)) < 0.9 * error(top)


@pytest.mark.parametrize("draw", ["laplace", "normal"])
def test_aciq_is_the_papers_clip_of_the_raw_samples(draw: str) -> None:
    generator = np.random.default_rng(0)
    x = getattr(generator, draw)(0, 3.0, (1000, 64)).astype(np.float32)
    x[0, 0] = 60
    if draw == "laplace":
        want = laplace_clip(8) * np.abs(x).mean()
    else:
        want = normal_clip(8) * math.sqrt((x.astype(np.float64) ** 2).mean())
    got = find_activation_scale(gathered(torch.from_numpy(x)), "aciq", "int")
    assert float(got) * 127.5 == pytest.approx(want, rel=1e-4)


def reference_kl(x: np.ndarray, reach: float, top: float) -> tuple[list[int], list[float]]:
    """Migacz's loop over thresholds on numpy's histogram, one cell at a time."""
    counts = np.histogram(np.abs(x), bins=BINS, range=(0, reach))[0].astype(np.float64)
    used = int(top / reach * BINS) + 1
    candidates = [*range(128, used, 61), used]
    found = []
    for kept in candidates:
        p = counts[:kept].copy()
        q = np.zeros(kept)
        cell_of = np.arange(kept) * 128 // kept
        for cell in range(128):
            inside = (cell_of == cell) & (p > 0)
            if inside.any():
                q[inside] = p[inside].sum() / inside.sum()
        p[-1] += counts[kept:].sum()
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-4 / BINS)
        found.append(float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()))
    return candidates, found


@pytest.mark.parametrize("outliers", [False, True])
def test_kl_is_the_least_of_migaczs_loop(outliers: bool) -> None:
    x = sample(2, outliers)
    statistic = gathered(*torch.from_numpy(x))
    clip = float(find_activation_scale(statistic, "kl", "int")) * 127.5
    _, values = reference_kl(x, statistic.reach, statistic.top)
    kept = round(clip / statistic.reach * BINS)
    candidates, mine = reference_kl(x, statistic.reach, kept * statistic.reach / BINS - 1e-9)
    assert candidates[-1] == kept and mine[-1] <= min(values) * 1.0001 + 1e-9
    assert clip < 0.7 * statistic.top or not outliers


@pytest.mark.parametrize("grid", ["int", "fp8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zeros", "constant", "one value", "tiny", "huge", "outlier"])
def test_hostile_inputs_give_a_usable_scale(kind: str, method: str, grid: str) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    if kind in ("zeros", "one value"):
        x.zero_()
        x[0, 0] = 3.0 * (kind == "one value")
    elif kind == "constant":
        x.fill_(-2.5)
    elif kind == "outlier":
        x[0, 0] = 1e6
    x = x * {"tiny": 1e-42, "huge": 5e37}.get(kind, 1.0)
    scale = find_activation_scale(gathered(x), method, grid)
    assert scale.dtype == torch.float32 and scale.shape == (1,)
    assert bool(torch.isfinite(scale).all()) and float(scale) > 0
    assert float(scale) * inputs_of(grid).divisor <= max(float(x.abs().max()) * 1.0001, 1e-35) or kind == "zeros"


def test_refusals() -> None:
    statistic = gathered(torch.ones(2, 4))
    with pytest.raises(LlmqError, match="must be one of minmax"):
        find_activation_scale(statistic, "best")
    with pytest.raises(LlmqError, match="on the grid int or fp8"):
        find_activation_scale(statistic, "minmax", "nf4")
    with pytest.raises(LlmqError, match="percentile"):
        find_activation_scale(statistic, "percentile", "int", 0)
    with pytest.raises(LlmqError, match="dynamic"):
        find_activation_scale(Magnitudes(4, CPU))
    with pytest.raises(LlmqError, match="not finite"):
        statistic.update(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))


@pytest.mark.parametrize("powers", [(0, 0), (0, 9), (9, 0), (-120, 3), (3, -120)])
def test_two_merged_are_one_of_both(powers: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 8, generator=generator) * 2.0**power for power in powers)
    for one, other, both in (
        (gathered(first), gathered(second), gathered(first, second)),
        (gathered(first), gathered(torch.zeros(2, 8)), gathered(first, torch.zeros(2, 8))),
        (gathered(torch.zeros(2, 8)), gathered(second), gathered(torch.zeros(2, 8), second)),
        (gathered(first[:0]), gathered(second), gathered(second)),
    ):
        reach, counts = other.reach, other.counts.clone()
        one.merge(other)
        assert torch.equal(one.counts, both.counts)
        assert (one.reach, one.low, one.high, one.count) == (both.reach, both.low, both.high, both.count)
        for got, want in ((one.total, both.total), (one.size, both.size), (one.square, both.square)):
            assert float(got) == pytest.approx(float(want), rel=1e-12)
        assert other.reach == reach and torch.equal(other.counts, counts)
