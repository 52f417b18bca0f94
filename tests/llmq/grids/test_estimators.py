"""Estimators of a range: against float64 written out group by group, the papers' tables, and hostile groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.base import round_to_grid
from llmq.grids.entropy import entropy_clip, even_cells
from llmq.grids.estimators import BINS, PERCENTILE, REACH, STRIDE, Histogram, clip_bounds, laplace_clip, normal_clip
from llmq.grids.ranges import find_range
from llmq.grids.scheme import RANGES, Scheme


def sample(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight * (1 + torch.randn(rows, width, generator=generator) ** 2) * 0.02 + 0.01


def hostile(kind: str, size: float, seed: int) -> Tensor:
    weight = sample(seed, 4, 64)
    if kind == "zero":
        weight = torch.zeros(4, 64)
    elif kind == "outlier":
        weight = torch.zeros(4, 64)
        weight[:, 5] = 1.0
    elif kind == "constant":
        weight = torch.full((4, 64), -0.7)
    elif kind == "outlier among small":
        weight = weight * 1e-5
        weight[:, 9] = -1.0
    elif kind == "one group zero":
        weight[1, :32] = 0
    return (weight / weight.abs().max().clamp_min(1e-9) * size).clamp(-3e38, 3e38)


KINDS = ("zero", "outlier", "constant", "outlier among small", "one group zero", "random")


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(RANGES),
    st.builds(Scheme, st.integers(2, 8), st.sampled_from([2, 32, None]), st.booleans()),
    st.sampled_from(KINDS),
    st.sampled_from([1e-38, 1e-20, 1e-3, 1.0, 6e4, 3e38]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 2**31),
)
def test_scales_are_finite_and_never_zero(
    method: str, scheme: Scheme, kind: str, size: float, dtype: torch.dtype, seed: int
) -> None:
    weight = hostile(kind, size, seed).to(dtype)
    scale, zero = find_range(weight, scheme, method, torch.rand(64) + 0.1, dtype)
    assert scale.dtype == dtype and bool(torch.isfinite(scale).all()) and bool((scale != 0).all())
    codes = round_to_grid(weight, scale, zero, scheme)
    levels = codes.float() - (0 if zero is None else zero.float().repeat_interleave(64 // zero.shape[1], 1))
    value = levels.double() * scale.double().repeat_interleave(64 // scale.shape[1], 1)
    top = weight.double().abs().max()
    assert bool((value.abs() <= 1.7 * top + 1e-36).all()), "nothing is blown up"
    assert bool((value[weight == 0].abs() <= 1e-2 * top).all()) or scheme.bits < 8


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["percentile", "kl", "aciq"]), st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
def test_never_beyond_minmax(method: str, bits: int, symmetric: bool, seed: int) -> None:
    weight = sample(seed, 8, 64)
    for group in (16, None):
        scheme = Scheme(bits, group, symmetric)
        clipped, _ = find_range(weight, scheme, method, None, torch.float32)
        full, _ = find_range(weight, scheme, "minmax", None, torch.float32)
        assert bool((clipped <= full * 1.00001).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_percentile_is_numpys(group: int, bits: int) -> None:
    weight = sample(bits, 3, 1024).view(3, -1, group)
    low, high = clip_bounds(weight, "percentile", bits, True)
    want = np.percentile(weight.double().abs().numpy(), PERCENTILE[bits], axis=-1)
    np.testing.assert_allclose(high.squeeze(-1).numpy(), want, rtol=1e-5)
    assert torch.equal(low, -high)
    low, high = clip_bounds(weight, "percentile", bits, False)
    tail = (100 - PERCENTILE[bits]) / 2
    want = np.percentile(weight.double().numpy(), [tail, 100 - tail], axis=-1)
    np.testing.assert_allclose(low.squeeze(-1).numpy(), np.minimum(want[0], 0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(high.squeeze(-1).numpy(), np.maximum(want[1], 0), rtol=1e-4, atol=1e-7)


def test_percentile_lets_one_outlier_go() -> None:
    weight = sample(0, 1, 1024)
    weight[0, 77] = 50.0
    scale, _ = find_range(weight, Scheme(4, None), "percentile", None, torch.float32)
    full, _ = find_range(weight, Scheme(4, None), "minmax", None, torch.float32)
    assert float(scale) < float(full) / 50


def expected_error(density: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> tuple[float, float]:
    """E(x − x̂)² on 2^bits cells of [−α, α] represented by their middles; and as the paper has it: Δ²/12 for every x,
    beside what is lost beyond α. Both by the trapezoid rule.
    """
    step = 2 * alpha / 2**bits
    rounded = np.clip((np.floor(x / step) + 0.5) * step, -alpha + step / 2, alpha - step / 2)
    beyond = (np.abs(x) - alpha).clip(min=0) ** 2
    true, paper = (float(np.trapezoid(each * density, x)) for each in ((x - rounded) ** 2, beyond))
    return true, paper + step**2 / 12


@pytest.mark.parametrize(
    ("clip", "table"),
    [(laplace_clip, {2: 2.83, 3: 3.89, 4: 5.03}), (normal_clip, {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93})],
)
def test_aciq_tables_of_the_paper(clip: object, table: dict[int, float]) -> None:
    assert callable(clip)
    for bits, alpha in table.items():
        assert clip(bits) == pytest.approx(alpha, abs=0.011)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["laplace", "normal"])
def test_aciq_is_near_the_least_expected_error(name: str, bits: int) -> None:
    x = np.linspace(-40, 40, 40_001)
    density = np.exp(-np.abs(x)) / 2 if name == "laplace" else np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    alpha = laplace_clip(bits) if name == "laplace" else normal_clip(bits)
    clips = np.linspace(0.5, 1.6, 111) * alpha
    true, paper = np.array([expected_error(density, x, clip, bits) for clip in clips]).T
    here = expected_error(density, x, alpha, bits)
    assert clips[paper.argmin()] == pytest.approx(alpha, rel=0.0101), "the minimum of the paper's own error"
    assert here[0] < 1.08 * true.min(), "and near that of the true one"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_aciq_takes_the_likelier_distribution(bits: int) -> None:
    generator = np.random.default_rng(0)
    for draw, clip, spread in (
        (generator.laplace(0, 0.03, (4, 4096)), laplace_clip(bits), lambda w: np.abs(w).mean(-1)),
        (generator.normal(0, 0.03, (4, 4096)), normal_clip(bits), lambda w: np.sqrt((w * w).mean(-1))),
    ):
        _, high = clip_bounds(torch.from_numpy(draw).float(), "aciq", bits, True)
        np.testing.assert_allclose(high.squeeze(-1).numpy(), clip * spread(draw), rtol=1e-4)
        shifted = torch.from_numpy(draw).float() + 0.02
        low, high = clip_bounds(shifted, "aciq", bits, False)
        np.testing.assert_allclose(((low + high) / 2).squeeze(-1).numpy(), shifted.double().mean(-1), atol=1e-6)


def reference_entropy(counts: np.ndarray, candidates: list[int], levels: int) -> list[float]:
    """Migacz's divergences, one candidate and one cell at a time."""
    found = []
    for kept in candidates:
        p = counts[:kept].astype(np.float64).copy()
        q = np.zeros(kept)
        cells = [[j for j in range(kept) if j * levels // kept == cell] for cell in range(levels)]
        for cell in cells:
            full = [j for j in cell if p[j] > 0]
            for j in full:
                q[j] = p[cell].sum() / len(full)
        p[-1] += counts[kept:].sum()
        p, q = p / p.sum(), q / max(q.sum(), 1e-300)
        found.append(sum(a * math.log(a / max(b, 1e-4 / len(counts))) for a, b in zip(p, q, strict=True) if a > 0))
    return found


@pytest.mark.parametrize("levels", [2, 8, 16])
@pytest.mark.parametrize("empty", [False, True])
def test_entropy_is_migaczs(levels: int, empty: bool) -> None:
    generator = np.random.default_rng(levels)
    counts = np.histogram(np.abs(generator.laplace(0, 1, 20_000)), bins=128, range=(0, 10))[0]
    if empty:
        counts[::3] = 0
    candidates = list(range(levels, 129, 4))
    kept = torch.tensor(candidates)
    got = int(entropy_clip(torch.from_numpy(counts).double(), kept, even_cells(kept, 128, levels)))
    want = reference_entropy(counts, candidates, levels)
    assert want[got] == pytest.approx(min(want), rel=1e-6)
    assert min(want) < want[-1] or got == len(want) - 1


@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 256])
def test_kl_shares_one_histogram_of_normalized_groups(group: int) -> None:
    weight = sample(3, 64, 1024).view(64, -1, group) * torch.logspace(-3, 3, 64)[:, None, None]
    histogram = Histogram(weight.device)
    for part in weight.split(7):
        histogram.update(part)
    double = weight.double().numpy()
    size = np.sqrt((double**2).mean(-1, keepdims=True))
    counts = np.histogram(np.minimum(np.abs(double) / size, REACH - 1e-9), bins=BINS, range=(0, REACH))[0]
    assert np.abs(histogram.counts.numpy() - counts).sum() <= 8, "but for rounding at the edges"
    for bits in (2, 4):
        kept = list(range(STRIDE, BINS + 1, STRIDE))
        want = reference_entropy(histogram.counts.numpy(), kept, 2 ** (bits - 1))
        limit = histogram.limit(bits)
        found = BINS if math.isinf(limit) else round(limit * BINS / REACH)
        assert want[kept.index(found)] == pytest.approx(min(want), rel=1e-6)
        _, high = clip_bounds(weight, "kl", bits, True, limit)
        bound = np.minimum(size * limit, np.abs(double).max(-1, keepdims=True))
        np.testing.assert_allclose(high.numpy(), bound, rtol=1e-5)


def test_kl_ignores_the_scale_of_a_group() -> None:
    weight = sample(0, 32, 256)
    factor = 2.0 ** torch.arange(32)[:, None]
    one, _ = find_range(weight, Scheme(4, 64), "kl", None, torch.float32)
    other, _ = find_range(weight * factor, Scheme(4, 64), "kl", None, torch.float32)
    torch.testing.assert_close(other, one * factor)


@pytest.mark.parametrize("method", ["percentile", "kl", "aciq"])
def test_clipping_pays_where_tails_are_heavy(method: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).laplace(0, 0.02, (16, 1024))).float()
    error = {}
    for name in ("minmax", method):
        scale, zero = find_range(weight, Scheme(3, None), name, None, torch.float32)
        codes = round_to_grid(weight, scale, zero, Scheme(3, None))
        error[name] = float((weight.double() - codes.double() * scale.double()).square().sum())
    assert error[method] < 0.6 * error["minmax"]
