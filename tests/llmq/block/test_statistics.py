"""Statistics: what they are of all that they were fed, in parts or whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.block.statistics import Hessian, Inputs, MeanSquare

CPU = torch.device("cpu")
WIDTH = 6
SIZES = [(0, 40), (40, 0), (17, 23), (5, 700), (700, 5), (900, 1100), (2000, 3)]


def rows(count: int, seed: int = 0) -> Tensor:
    """Rows of small whole numbers, whose sums and products float32 holds exactly."""
    return torch.randint(-9, 10, (count, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


def fed(kind: type, x: Tensor) -> object:
    statistic = kind(WIDTH, CPU)
    for part in x.split(64):
        statistic.update(part[None])
    return statistic


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [MeanSquare, Hessian, Inputs])
def test_two_merged_are_one_of_both(kind: type, sizes: tuple[int, int]) -> None:
    x = rows(sum(sizes))
    one, other, both = fed(kind, x[: sizes[0]]), fed(kind, x[sizes[0] :]), fed(kind, x)
    before = {name: value.clone() for name, value in vars(other).items() if isinstance(value, Tensor)}
    one.merge(other)  # type: ignore[attr-defined]
    for name, value in vars(both).items():
        if name == "total" or name in ("squares", "low", "high"):
            assert torch.equal(getattr(one, name), value), name
    assert one.count == both.count == len(x)  # type: ignore[attr-defined]
    for name, value in before.items():
        assert torch.equal(getattr(other, name), value), name


@pytest.mark.parametrize("sizes", SIZES)
def test_sampled_rows_stay_evenly_spread(sizes: tuple[int, int]) -> None:
    """Rows that say which they are: no two are much nearer or farther from each other than others."""
    numbered = torch.arange(sum(sizes)).float()[:, None].expand(-1, WIDTH)
    one, other = fed(Inputs, numbered[: sizes[0]]), fed(Inputs, numbered[sizes[0] :])
    assert isinstance(one, Inputs) and isinstance(other, Inputs)
    one.merge(other)
    one.update(rows(64))
    assert len(one.rows) <= Inputs.ROWS
    found = [int(row[0]) for row in one.rows if float(row[0]) >= 0 and bool((row == row[0]).all())]
    gaps = [b - a for a, b in zip(found, found[1:], strict=False) if b > a]
    assert max(gaps) <= 2 * one.stride
    assert sum(sizes) - found[-1] <= 2 * one.stride or found[-1] < 10
    assert len(one.rows) >= min(sum(sizes), Inputs.ROWS) // 2 - 2


def test_hessian_is_the_sum_of_outer_products() -> None:
    x = rows(100)
    statistic = fed(Hessian, x)
    assert isinstance(statistic, Hessian)
    assert torch.equal(statistic.total.double(), x.double().t() @ x.double())


@pytest.mark.parametrize("counts", [(40, 90), (1, 500), (700, 3), (0, 50)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [MeanSquare, Hessian, Inputs])
def test_a_blend_has_the_mean_of_both_means(kind: type, alpha: float, counts: tuple[int, int]) -> None:
    """α · own/n + (1 − α) · other/m per sample, in float64; no sample of its own counts as one."""
    n, m = counts
    x, y = rows(n), rows(m, 1)
    one: Any = fed(kind, x)
    other: Any = fed(kind, y)
    before = {name: value.clone() for name, value in vars(other).items() if isinstance(value, Tensor)}
    one.blend(other, alpha)
    totals: dict[Any, Callable[[Tensor], Tensor]] = {
        MeanSquare: lambda t: t.square().sum(0),
        Hessian: lambda t: t.t() @ t,
        Inputs: lambda t: t.abs().sum(0),
    }
    means = {"total": totals[kind]}
    if kind is Inputs:
        means["squares"] = lambda t: t.square().sum(0)
    for name, total in means.items():
        want = alpha * total(x.double()) / max(1, n) + (1 - alpha) * total(y.double()) / m
        assert torch.allclose(getattr(one, name).double() / one.count, want, rtol=1e-5, atol=1e-6), name
    assert one.count == max(1, n) and other.count == m
    assert all(torch.equal(getattr(other, name), value) for name, value in before.items())
    if kind is Inputs:
        both = torch.cat([x, y])
        assert torch.equal(one.low, both.amin(0)) and torch.equal(one.high, both.amax(0))
        own = [bool((x.float() == row).all(1).any()) for row in one.rows]
        assert 0 < len(own) <= Inputs.ROWS
        assert all(mine or bool((y.float() == row).all(1).any()) for row, mine in zip(one.rows, own, strict=True))
        assert not n or abs(sum(own) - alpha * len(own)) <= 1
