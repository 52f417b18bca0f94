"""float8 weights with a scale for each block: the best scale of a block, and that nothing unties its channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.grids import float8
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics.clipping import clip_groups
from llmq.numerics.gptq import solve
from llmq.numerics.hqq import half_quadratic
from llmq.numerics.learned_rounding import LearnedWeight
from llmq.numerics.straight_through import TrainedWeight

SCHEME = Scheme(8, 128, grid="fp8-block")


def sample(rows: int = 300, width: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))


def blocks(value: Tensor) -> list[Tensor]:
    """The blocks of a matrix, the last of which have fewer rows."""
    return [block for band in value.split(128) for block in band.split(128, 1)]


@pytest.mark.parametrize("method", ["minmax", "mse", "weighted"])
def test_the_best_scale_of_a_block_in_float64(method: str) -> None:
    weight, importance = sample(), torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.01
    scale, zero = rounding_of(SCHEME.rules).find_scale(weight, SCHEME, method, importance, torch.float32)
    assert scale.shape == (300, 2) and zero is None
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = torch.unique(grid[grid.isfinite()])
    middles = (grid[1:] + grid[:-1]) / 2
    by = importance.double() if method == "weighted" else torch.ones(256).double()
    scales = [column for band in scale.split(128) for column in band.t()]
    for block, found, factor in zip(blocks(weight.double()), scales, 3 * by.split(128), strict=True):
        assert bool((found == found[0]).all())
        steps = torch.tensor([1.0, *(float8.STEPS if method != "minmax" else ())])
        costs = []
        for tried in (found[0].double(), *(block.abs().max() / 448 * steps)):
            near = grid[torch.bucketize(block / tried, middles)] * tried
            costs.append(float(((near - block).square() * factor).sum()))
        assert costs[0] <= min(costs) * (1 + 1e-5)


def tied(q: QuantizedWeight) -> bool:
    """Whether all channels of each block have its stored scale."""
    parts = zip(q.scale.split(128), q.stored_scale, strict=True)
    return all(bool((band == stored).all()) for band, stored in parts)


def test_no_solver_unties_channels() -> None:
    weight = sample().bfloat16().float()
    x = torch.randn(600, 256, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, 256)
    hessian = x.t() @ x / len(x)
    nearest = round_to_nearest(weight, SCHEME, torch.bfloat16)
    assert isinstance(nearest, QuantizedWeight)
    made = [nearest, half_quadratic(weight, SCHEME, torch.bfloat16)]
    made += [solve(weight, hessian, SCHEME, act_order=order, sweeps=2) for order in ("none", "grouped", "static")]
    made += [clip_groups(weight, nearest.scale, None, SCHEME, hessian)]
    for learned in (LearnedWeight(nearest, weight), TrainedWeight(nearest, weight)):
        learned.step(torch.randn(weight.shape), 0.1, 0.1)
        made.append(learned.quantized())
    for q in made:
        assert tied(q) and float((q.dequantize(torch.float32) - weight).norm() / weight.norm()) < 0.1

    def loss(q: QuantizedWeight) -> float:
        return float((x @ (q.dequantize(torch.float32) - weight).t()).square().sum())

    assert all(loss(q) < loss(nearest) for q in made[2:5])
