"""Integers with scales that are powers of two: against brute force, in every solver, and as shifts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.activations import round_input
from llmq.grids.base import QuantizedWeight, round_to_grid, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.power_scales import PowerInteger, power_above
from llmq.grids.scheme import Activations, Scheme
from llmq.numerics.gptq import solve
from llmq.numerics.hqq import half_quadratic
from llmq.numerics.learned_rounding import LearnedWeight
from tests.llmq.grids.test_ternary import sample

SCHEMES = [Scheme(2, 16, scales="pow2"), Scheme(4, 16, False, scales="pow2"), Scheme(8, None, scales="pow2")]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def powers(scale: Tensor) -> bool:
    return bool(((torch.frexp(scale.float())[0] == 0.5) & torch.isfinite(scale)).all())


def cost(weight: Tensor, q: QuantizedWeight, by: Tensor) -> Tensor:
    left = (q.dequantize(torch.float64) - weight.double()).square() * by.double()
    return left.view(*q.scale.shape, -1).sum(-1)


@EVERY
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["mse", "weighted"]))
def test_no_power_of_two_with_a_zero_point_that_covers_it_is_better(scheme: Scheme, seed: int, method: str) -> None:
    weight = sample(seed)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.1
    by = importance if method == "weighted" else torch.ones(32)
    q = round_to_nearest(weight, scheme, torch.bfloat16, method, importance)
    assert isinstance(q, QuantizedWeight) and powers(q.scale)
    least = torch.full(q.scale.shape, torch.inf, dtype=torch.float64)
    for exponent in range(-12, 12):
        scale = torch.full_like(q.scale, 2.0**exponent)
        tried = [None] if scheme.symmetric else [torch.full_like(scale, z, dtype=torch.int8) for z in range(-8, 8)]
        for zero in tried:
            near = QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)
            least = torch.minimum(least, cost(weight, near, by))
    if scheme.symmetric:
        assert bool((cost(weight, q, by) <= least * 1.00001).all())
    # Of zero points only those are tried that divide the range at its ends or in its middle: a group may lose by that,
    # all together hardly.
    assert float(cost(weight, q, by).sum()) <= 1.5 * float(least.sum())


@EVERY
def test_minmax_is_the_smallest_that_clips_by_half_a_step_at_most(scheme: Scheme) -> None:
    weight = sample(1)
    q = round_to_nearest(weight, scheme, torch.bfloat16, "minmax")
    assert isinstance(q, QuantizedWeight)
    wide = q.scale.float().repeat_interleave(32 // q.scale.shape[1], 1)
    assert bool(((q.dequantize(torch.float32) - weight).abs() <= wide / 2).all())
    size = weight.view(*q.scale.shape, -1)
    low, high = size.amin(-1).clamp(max=0), size.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    assert bool((span > (q.scale.float() / 2) * (2**scheme.bits - 1)).all())


@EVERY
def test_every_solver_keeps_powers_of_two(scheme: Scheme) -> None:
    weight = sample(2)
    weight[3] = 0
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    made = [half_quadratic(weight, scheme, torch.bfloat16, p=3.0, unbiased=0.7)]
    made += [solve(weight, x.t() @ x, scheme, act_order=order, sweeps=2) for order in ("static", "grouped")]
    for q in made:
        learned = LearnedWeight(q, weight)
        for _ in range(20):
            learned.step(torch.randn(8, 32), 0.02, 0.05)
        assert powers(q.scale) and powers(learned.quantized().scale)
        assert bool((q.dequantize(torch.float32)[3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_power_is_stored_within_the_dtype(dtype: torch.dtype) -> None:
    info, rounding = torch.finfo(dtype), PowerInteger()
    scale = torch.tensor([0.0, 1.0, 1.49, 1.5, 1.51, -0.7, 3e38, 1e-45])
    top = 2.0 ** math.floor(math.log2(info.max))
    want = [info.tiny, 1.0, 1.0, 1.0, 2.0, -0.5, top, info.tiny]
    found = rounding.storable(scale, dtype)
    assert found.tolist() == want == found.to(dtype).float().tolist()
    assert torch.equal(rounding.storable(scale / 8, dtype, 8.0), found / 8)
    assert power_above(torch.tensor([1.0, 1.01, 0.75, 0.5])).tolist() == [1.0, 2.0, 1.0, 0.5]


def test_static_scales_of_inputs_are_powers_of_two() -> None:
    scheme, x = Scheme(8, None, activations=Activations(dynamic=False), scales="pow2"), sample(4)
    steps = round_input(x, scheme, torch.tensor([0.03])) / 2.0**-5
    assert torch.equal(steps, steps.round()) and torch.equal(steps, (x * 32).round().clamp(-128, 127))


def test_rows_say_which_grids_may_have_them() -> None:
    assert isinstance(rounding_of(SCHEMES[0].rules), PowerInteger)
    assert not isinstance(rounding_of(Scheme().rules), PowerInteger)
