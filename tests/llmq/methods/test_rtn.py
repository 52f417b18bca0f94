"""RTN: the codes of min-max and of every other way to find a scale, what it needs for that, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.block.statistics import MeanSquare
from llmq.grids.base import QuantizedWeight, rounded_on
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS, RANGES
from llmq.methods.rtn import RTN
from tests.llmq.refusal import refused

CPU = torch.device("cpu")


def weight(width: int = 32) -> Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(0))


def activity(width: int = 32) -> MeanSquare:
    """The statistic of inputs of which every other channel is 100 times as large."""
    found = MeanSquare(width, CPU)
    found.update(torch.tensor([0.1, 10.0]).repeat(4, width // 2))
    return found


def test_min_max_is_the_nearest_whole_number_of_half_the_span() -> None:
    found = RTN(range="minmax").quantize(weight(), Scheme(4, 8), {}, torch.float32)
    assert isinstance(found, QuantizedWeight)
    groups = weight().numpy().reshape(6, 4, 8)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7.5)
    assert np.allclose(found.scale.numpy(), scale[..., 0], rtol=1e-6)
    # The largest weight lies right between two codes; only float32 tells which it gets.
    near = np.abs(found.codes.numpy().reshape(6, 4, 8) - groups / scale)
    assert near.max() <= 0.5 + 1e-5 and found.zero is None


@pytest.mark.parametrize("name", RANGES)
def test_a_scale_is_found_as_told(name: str) -> None:
    scheme, square = Scheme(3, 8), activity()
    method = RTN(range=name)
    found = method.quantize(weight(), scheme, {MeanSquare: square}, torch.float32)
    importance = torch.tensor([0.01, 100.0]).repeat(16) if name == "weighted" else None
    want = rounded_on(weight(), *find_range(weight(), scheme, name, importance, torch.float32), scheme)
    assert torch.equal(found.dequantize(torch.float32), want.dequantize(torch.float32))
    assert method.quantize_needs == ((MeanSquare,) if name == "weighted" else ())


def test_what_inputs_weigh_counts_only_where_it_is_asked_for() -> None:
    given = {MeanSquare: activity()}
    plain, told = (RTN(range=name).quantize(weight(), Scheme(3, 8), given, torch.float32) for name in (None, "mse"))
    assert torch.equal(plain.dequantize(torch.float32), told.dequantize(torch.float32))
    weighted = RTN(range="weighted").quantize(weight(), Scheme(3, 8), given, torch.float32)

    def cost(by: Tensor, value: Tensor) -> float:
        return float(((value.double() - weight().double()).square() * by).sum())

    by = activity().mean.double()
    assert cost(by, weighted.dequantize(torch.float32)) < 0.99 * cost(by, plain.dequantize(torch.float32))


def test_without_its_statistic_weighted_refuses() -> None:
    method = RTN(range="weighted")
    refused(lambda: method.quantize(weight(), Scheme(4, 8), {}, torch.float32), "no MeanSquare statistic was collected")


def test_it_knows_every_grid_but_only_the_ways_that_a_grid_has() -> None:
    nf4 = Scheme(4, 64, grid="nf4")
    assert RTN().grids() == tuple(GRIDS)
    assert [RTN().refusal(scheme) for scheme in (Scheme(), nf4, Scheme(8, None, grid="fp8"))] == [None] * 3
    assert RTN(range="kl").refusal(Scheme()) is None
    assert RTN(range="kl").refusal(nf4) == "scales of nf4 g64 are found by minmax, mse, weighted, not by --range kl"
    refused(lambda: RTN(range="wieghted"), "range", "did you mean 'weighted'")
