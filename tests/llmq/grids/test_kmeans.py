"""Levels of each row: against the optimum by dynamic programming, brute force, and what stored levels promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.kmeans import KMeans
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics.learned_rounding import LearnedWeight, positions
from llmq.numerics.scale_factors import factor_gradient, scaled_by
from llmq.numerics.straight_through import TrainedWeight

BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def scheme_of(bits: int) -> Scheme:
    return Scheme(bits, None, grid="kmeans")


def weight(rows: int = 5, width: int = 96, seed: int = 0) -> Tensor:
    value = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return value * torch.logspace(-3, 3, rows)[:, None]


def rounded(bits: int, value: Tensor, dtype: torch.dtype = torch.bfloat16, **rest: object) -> QuantizedWeight:
    q = round_to_nearest(value, scheme_of(bits), dtype, **rest)  # type: ignore[arg-type]
    assert isinstance(q, QuantizedWeight) and q.levels is not None
    return q


def shared(bits: int, rows: int, value: Tensor, dtype: torch.dtype = torch.bfloat16, **rest: object) -> QuantizedWeight:
    q = round_to_nearest(value, Scheme(bits, None, grid="kmeans", level_rows=rows), dtype, **rest)  # type: ignore[arg-type]
    assert isinstance(q, QuantizedWeight) and q.levels is not None
    return q


def optimum(row: Tensor, share: Tensor, count: int) -> float:
    """The least weighted squared error with `count` levels: clusters are intervals of the sorted values."""
    order = row.argsort()
    x, w = row[order].double(), share[order].double()
    zero = torch.zeros(1, dtype=torch.float64)
    mass, first, second = (torch.cat((zero, part.cumsum(0))) for part in (w, w * x, w * x * x))
    n = len(row)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        spread = second[i + 1 :] - second[i] - (first[i + 1 :] - first[i]).square() / (mass[i + 1 :] - mass[i])
        cost[i, i + 1 :] = spread.clamp_min(0)
    best = cost[0]
    for _ in range(count - 1):
        best = torch.minimum(best, (best[:, None] + cost).amin(0))
    return float(best[-1])


@BITS
def test_levels_are_near_the_optimum(bits: int) -> None:
    value = weight()
    share = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.05
    q = rounded(bits, value, torch.float32, range="weighted", importance=share)
    for row, near in zip(value, q.dequantize(torch.float32), strict=True):
        error = float(((row - near).double().square() * share).sum())
        assert error <= 1.02 * optimum(row, share, 1 << bits)


@BITS
@pytest.mark.parametrize("width", [20, 96])
def test_shared_levels_are_near_the_optimum_of_their_rows(bits: int, width: int) -> None:
    """Rows over their root mean squares, each value counted by the square of that: two tables of 3 rows and of 2."""
    value = weight(width=width)
    share = torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.05
    q = shared(bits, 3, value, torch.float32, range="weighted", importance=share)
    assert q.levels is not None and torch.equal(q.levels[1], q.levels[0]) and torch.equal(q.levels[3], q.levels[4])
    size = value.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(q.scale, size)
    for rows in (slice(0, 3), slice(3, 5)):
        counts = size[rows].square() / size[rows].square().amax() * share
        least = optimum((value / size)[rows].flatten(), counts.flatten(), 1 << bits)
        error = ((value - q.dequantize(torch.float32))[rows].double().square() * share).sum() / size[
            rows
        ].square().amax()
        assert float(error) <= 1.02 * least


@BITS
def test_each_weight_takes_the_nearest_of_shared_levels(bits: int) -> None:
    value = weight()
    value[2] = 0
    q = shared(bits, 4, value)
    assert q.levels is not None and bool((q.levels.diff() >= 0).all())
    assert torch.equal(q.levels.to(torch.bfloat16).float(), q.levels) and bool((q.scale > 0).all())
    points = q.levels.double() * q.scale.double()
    least = (value.double()[:, :, None] - points[:, None]).abs().amin(-1)
    found = (value.double() - q.dequantize(torch.float32).double()).abs()
    assert torch.allclose(found, least, rtol=1e-5, atol=1e-9)
    assert float(q.dequantize(torch.float32)[2].abs().amax()) < 1e-36


def test_every_shared_level_survives() -> None:
    """Codes and their points, each level of each row, before and after they are opened again."""
    q = shared(3, 2, weight(rows=4, width=64))
    rounding = rounding_of(q.scheme.rules).on(q.levels)
    codes = torch.arange(8, dtype=torch.uint8).repeat(4, 1)
    points = rounding.decode(codes, q.scheme)
    assert q.levels is not None and torch.equal(points, q.levels)
    assert torch.equal(rounding.encode(points, q.scheme), codes)
    again = rounding.finish(rounding.reopen(q), torch.bfloat16)
    assert isinstance(again, QuantizedWeight) and again.levels is not None
    assert torch.equal(again.levels, q.levels) and torch.equal(again.scale, q.scale)


@BITS
def test_each_weight_takes_the_nearest_level(bits: int) -> None:
    value = weight()
    q = rounded(bits, value)
    assert q.levels is not None and bool((q.levels.diff() >= 0).all())
    assert torch.equal(q.levels.to(torch.bfloat16).float(), q.levels) and bool((q.scale == 1).all())
    least = (value.double()[:, :, None] - q.levels.double()[:, None]).abs().amin(-1)
    assert torch.allclose((value - q.dequantize(torch.float32)).abs().double(), least, rtol=1e-6)


@BITS
def test_reopening_and_finishing_changes_nothing(bits: int) -> None:
    q = rounded(bits, weight(), torch.float16)
    rounding = rounding_of(q.scheme.rules)
    opened = rounding.reopen(q)
    assert opened.levels is not None and bool((opened.levels.abs().amax(1) <= 2).all())
    again = rounding.finish(opened, torch.float16)
    assert isinstance(again, QuantizedWeight) and again.levels is not None and q.levels is not None
    assert torch.equal(again.codes, q.codes) and torch.equal(again.levels, q.levels)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_learned_starts_at_the_codes(rows: int) -> None:
    value = weight()
    q = rounding_of(scheme_of(3).rules).reopen(shared(3, rows, value, torch.float32))
    dense = q.dequantize(torch.float32)
    assert torch.equal(positions(value, q).round().to(torch.uint8).flatten(1), q.codes)
    out = torch.empty_like(value)
    for learned in (LearnedWeight(q, value), TrainedWeight(q, value), TrainedWeight(q, value, "dsq")):
        learned.value(out)
        assert torch.equal(out, dense)
        learned.step(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)), 0.4, 0.01)
        learned.value(out)
        assert torch.allclose(out, learned.quantized().dequantize(torch.float32)) and not torch.equal(out, dense)


@pytest.mark.parametrize("rows", [1, 4])
def test_factors_move_levels(rows: int) -> None:
    q = rounding_of(scheme_of(3).rules).reopen(shared(3, rows, weight(), torch.float32))
    moved = scaled_by(q, torch.full((5, 1), 1.25))
    assert torch.allclose(moved.dequantize(torch.float32), 1.25 * q.dequantize(torch.float32))
    slope = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(factor_gradient(q, slope)[:, 0], (slope * q.dequantize(torch.float32)).sum(1), rtol=1e-4)


def test_the_ends() -> None:
    nothing = torch.zeros(2, 64)
    assert torch.equal(rounded(2, nothing).dequantize(torch.float32), nothing)
    few = torch.tensor([1.0, -2.0, 3.0, 0.5]).repeat(2, 16)
    assert torch.equal(rounded(2, few).dequantize(torch.float32), few)
    tiny = torch.full((1, 64), 1e-40)
    assert bool(torch.isfinite(rounded(4, tiny, torch.float32).dequantize(torch.float32)).all())
    for bad in (torch.nan, torch.inf):
        broken = torch.ones(2, 64)
        broken[1, 3] = bad
        for rows in (1, 2):
            with pytest.raises(LlmqError, match="not finite"):
                round_to_nearest(broken, Scheme(4, None, grid="kmeans", level_rows=rows), torch.bfloat16)
    for value in (nothing, tiny):
        assert torch.allclose(shared(2, 2, value, torch.float32).dequantize(torch.float32), value, atol=1e-38)
    with pytest.raises(LlmqError, match="not known before"):
        KMeans().levels(scheme_of(4), torch.device("cpu"))
    with pytest.raises(LlmqError, match="importance"):
        KMeans().fitted(nothing, scheme_of(4), "weighted", None, torch.bfloat16)
