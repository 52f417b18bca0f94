"""AWQ: the scales of equation 5 by hand, which channels grow in a block, and clipping against a search on outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.block.attempt import Outcome
from llmq.block.statistics import Hessian
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.grids.table import FIXED
from llmq.methods.awq import AWQ
from llmq.numerics.clipping import FACTORS
from tests.llmq.methods.made import block_of, by_name, check_function_is_kept, facts, near, row
from tests.llmq.refusal import refused


def test_awq_equation_5() -> None:
    """s = s_X^α, s_X = E|x|; brought to where the largest and the smallest are as far from 1."""
    found = by_name(AWQ(alphas=2)._candidates(facts()))
    assert list(found) == ["α 0.5", "α 0.5, by weight", "α 1", "α 1, by weight"]
    # √(1, 16, 4) = (1, 4, 2), over √(4 · 1) = 2.
    assert near(found["α 0.5"].scale, 0.5, 2, 1)
    # (1, 16, 4) over √16 = 4.
    assert near(found["α 1"].scale, 0.25, 4, 1)
    # As the authors' code divides by share^(1−α): (1, 4, 2) / (0.5, 1, √0.5) = (2, 4, 2.828), over √8.
    assert near(found["α 0.5, by weight"].scale, 2 / 8**0.5, 4 / 8**0.5, 1)
    assert near(found["α 1, by weight"].scale, 0.25, 4, 1)
    assert all(candidate.shift is None for candidate in found.values())


def test_awq_tries_as_many_as_told() -> None:
    assert len(by_name(AWQ(alphas=7)._candidates(facts()))) == 14
    refused(lambda: AWQ(alphas=0), "alphas must be 1 or more")
    silent = by_name(AWQ(alphas=3)._candidates(facts(mean=row(0, 0, 0), share=row(0, 0, 0))))
    assert all(bool(c.scale.isfinite().all() and (c.scale > 0).all()) for c in silent.values())


def test_a_block_is_balanced_pair_by_pair_and_keeps_its_function() -> None:
    block = block_of(Scheme(3, 4))
    before = block.error()
    AWQ().transform(block)
    assert [line.method for line in block.log] == ["awq"] * 2
    assert [line.where for line in block.log] == [pair.describe() for pair in block.pairs]
    assert block.log[0].outcome is Outcome.KEPT and block.log[0].choice.startswith("α ")
    assert block.error() < before
    check_function_is_kept(block)


def test_a_pair_that_feeds_nothing_quantized_is_passed_over() -> None:
    block = block_of(Scheme(3, 4), kept=("down.weight",))
    AWQ(alphas=2).transform(block)
    assert [line.where for line in block.log] == [block.pairs[0].describe()]


def correlated(width: int = 32) -> Tensor:
    """Inputs of which some channels are larger than others and go together."""
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=draw) * torch.linspace(0.1, 3, width)
    return torch.randn(64, width, generator=draw) @ mix


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_is_clipped_where_its_own_output_errs_least(symmetric: bool) -> None:
    scheme, x = Scheme(3, 8, symmetric), correlated()
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    hessian = Hessian(32, torch.device("cpu"))
    hessian.update(x)
    found = AWQ().quantize(weight, scheme, {Hessian: hessian}, torch.float32)
    assert isinstance(found, QuantizedWeight)
    start, zero = find_range(weight, scheme, "weighted", x.square().mean(0), torch.float32)
    inputs, exact = x.double().view(64, 4, 8), weight.double().view(6, 4, 8)
    held = torch.zeros(6, 4, 1) if zero is None else zero.float().unsqueeze(-1)
    costs = []
    for factor in (1.0, *FACTORS):
        scale = (start * factor).unsqueeze(-1)
        codes = ((weight.view(6, 4, 8) / scale).round() + held).clamp(-4, 3)
        rounded = (codes - held).double() * scale.double()
        costs.append(torch.einsum("tgi,ogi->tgo", inputs, rounded - exact).square().sum(0).t())
    got = found.dequantize(torch.float64).view(6, 4, 8)
    cost = torch.einsum("tgi,ogi->tgo", inputs, got - exact).square().sum(0).t()
    assert torch.allclose(cost, torch.stack(costs).amin(0), rtol=1e-3)
    assert float(cost.sum()) < 0.98 * float(costs[0].sum())


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, None, grid="fp8"), Scheme(4, 64, grid="nf4")], ids=str)
def test_it_gives_what_the_grid_stores(scheme: Scheme) -> None:
    weight, hessian = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)), Hessian(64, torch.device("cpu"))
    hessian.update(correlated(64))
    found = AWQ().quantize(weight, scheme, {Hessian: hessian}, torch.bfloat16)
    assert type(found) is type(round_to_nearest(weight, scheme, torch.bfloat16)) and found.scheme == scheme
    assert AWQ().refusal(scheme) is None and AWQ().grids() == FIXED


def test_without_its_statistic_it_refuses() -> None:
    refused(
        lambda: AWQ().quantize(torch.ones(2, 8), Scheme(4, 8), {}, torch.float32), "no Hessian statistic was collected"
    )
