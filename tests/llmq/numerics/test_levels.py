"""Levels refitted by least squares, against numpy-like float64 solutions row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.scheme import Scheme
from llmq.numerics.gptq import solve
from llmq.numerics.levels import refit

SCHEME = Scheme(2, None, grid="kmeans")


def objective(q: QuantizedWeight, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = weight.double() - q.dequantize(torch.float32).double()
    return ((error @ hessian.double()) * error).sum(1)


def test_the_levels_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 40, generator=generator), torch.randn(200, 40, generator=generator)
    x[:, 1:] += x[:, :-1]
    hessian = x.t() @ x / 200
    start = rounding_of(SCHEME.rules).round(weight, SCHEME, torch.float32, "mse", None)
    assert isinstance(start, QuantizedWeight) and start.levels is not None
    gradient = hessian @ (weight - start.dequantize(torch.float32)).t()
    found = refit(start.codes, start.levels, gradient, hessian, torch.float32)
    for row in range(6):
        chosen = torch.nn.functional.one_hot(start.codes[row].long(), 4).double()
        exact = torch.linalg.lstsq(x.double() @ chosen, x.double() @ weight[row].double().unsqueeze(1)).solution
        if bool((exact.flatten().diff() >= 0).all()):
            assert torch.allclose(found[row].double(), exact.flatten(), atol=1e-3)
        else:
            assert torch.equal(found[row], start.levels[row])
    assert bool((objective(replace(start, levels=found), weight, hessian) <= objective(start, weight, hessian)).all())


def test_shared_levels_are_those_of_least_squares_on_all_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 40, generator=generator), torch.randn(200, 40, generator=generator)
    weight *= torch.tensor([1.0, 3.0, 0.2, 5.0, 0.5])[:, None]
    x[:, 1:] += x[:, :-1]
    hessian = x.t() @ x / 200
    scheme = Scheme(2, None, grid="kmeans", level_rows=3)
    start = rounding_of(scheme.rules).round(weight, scheme, torch.float32, "mse", None)
    assert isinstance(start, QuantizedWeight) and start.levels is not None
    gradient = hessian @ (weight - start.dequantize(torch.float32)).t()
    found = refit(start.codes, start.levels, gradient, hessian, torch.float32, start.scale, 3)
    for rows in (slice(0, 3), slice(3, 5)):
        chosen = torch.nn.functional.one_hot(start.codes[rows].long(), 4).double() * start.scale[rows, None].double()
        sides = (
            [(x.double() @ part).view(-1, 4) for part in chosen],
            [x.double() @ row.double() for row in weight[rows]],
        )
        exact = torch.linalg.lstsq(torch.cat(sides[0]), torch.cat(sides[1]).unsqueeze(1)).solution.flatten()
        assert bool((exact.diff() >= 0).all())
        assert torch.allclose(found[rows].double(), exact.expand_as(found[rows]), atol=1e-3)
    assert float(objective(replace(start, levels=found), weight, hessian).sum()) < float(
        objective(start, weight, hessian).sum()
    )


@pytest.mark.parametrize("rows", [1, 5])
def test_descent_lowers_what_gptq_found(rows: int) -> None:
    scheme = replace(SCHEME, level_rows=rows)
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(300, 64, generator=generator)
    x[:, 1:] += x[:, :-1]
    hessian = x.t() @ x / 300
    results = [
        solve(weight, hessian.clone(), scheme, act_order=order, sweeps=sweeps, damping=1e-4, scale_dtype=torch.bfloat16)
        for order in ("grouped", "none")
        for sweeps in (0, 1, 3)
    ]
    sums = [float(objective(q, weight, hessian).sum()) for q in results]
    nearest = rounding_of(scheme.rules).round(weight, scheme, torch.bfloat16, "weighted", hessian.diagonal())
    assert isinstance(nearest, QuantizedWeight)
    assert sums[2] < sums[1] < sums[0] < float(objective(nearest, weight, hessian).sum())
    assert sums[5] < sums[4] < sums[3]
    for q in results:
        assert q.levels is not None
        stored = rounding_of(scheme.rules).finish(q, torch.bfloat16)
        assert torch.equal(stored.dequantize(torch.float32), q.dequantize(torch.float32))


def test_levels_without_codes_follow_the_one_below() -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    gradient = torch.full((8, 1), 0.25)
    found = refit(codes, levels, gradient, torch.eye(8), torch.float32)
    assert torch.allclose(found, torch.full((1, 4), 0.25), atol=1e-5)
    # The level between stands in nobody's way.
    codes = torch.tensor([[0, 0, 2, 2]], dtype=torch.uint8)
    gradient = torch.tensor([[1.5], [1.5], [0.0], [0.0]])
    found = refit(codes, levels, gradient, torch.eye(4), torch.float32)
    assert torch.allclose(found, torch.tensor([[1.5, 1.5, 2.0, 2.0]]), atol=1e-4)
