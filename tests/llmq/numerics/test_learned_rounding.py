"""Learned rounding, against autograd in float64 and against what it may not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.base import QuantizedWeight, round_to_grid, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.numerics.learned_rounding import LearnedWeight, positions


def random(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, "mse")
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), group=st.sampled_from([4, 8, None]))
@settings(max_examples=60, deadline=None)
def test_it_starts_at_the_codes_it_was_given(bits: int, symmetric: bool, seed: int, group: int | None) -> None:
    weight, scheme = random(5, 16, seed), Scheme(bits, group, symmetric)
    q = nearest(weight, scheme)
    chosen = torch.randint(scheme.qmin, scheme.qmax + 1, (5, 16), generator=torch.Generator().manual_seed(seed))
    q = QuantizedWeight(chosen.to(torch.int8), q.scale, q.zero, scheme)
    learned = LearnedWeight(q, weight)
    again = learned.quantized()
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scale, q.scale) and again.scale.dtype == q.scale.dtype
    out = torch.empty(5, 16)
    learned.value(out)
    assert torch.equal(out, q.dequantize(torch.float32))


def test_a_weight_at_its_nearest_code_starts_where_it_stands() -> None:
    weight, scheme = random(4, 32, 0), Scheme(4, 8)
    q = nearest(weight, scheme)
    scale = q.scale.float().repeat_interleave(8, 1)
    exact = weight / scale
    inside = (exact - q.codes).abs() < 0.49
    assert inside.float().mean() > 0.9
    assert torch.allclose(positions(weight, q).flatten(1)[inside], exact[inside], atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_go_against_the_gradient_that_autograd_finds(symmetric: bool) -> None:
    rows, width, group = 6, 24, 8
    weight, scheme = random(rows, width, 1), Scheme(3, group, symmetric)
    q = nearest(weight, scheme)
    if symmetric:
        q = QuantizedWeight(-q.codes.clamp(min=-3), -q.scale, None, scheme)
    x = random(50, width, 2).double()
    target = x @ (weight.double() + 0.1 * random(rows, width, 3).double()).t()
    learned = LearnedWeight(q, weight)

    z = learned.position.double().requires_grad_(True)
    f = torch.ones(rows, width // group, 1, dtype=torch.float64, requires_grad=True)
    codes = z + (q.codes.view_as(z) - z).detach()
    zero = 0 if q.zero is None else q.zero.double().unsqueeze(-1)
    value = (q.scale.double().unsqueeze(-1) * f * (codes - zero)).flatten(1)
    value.retain_grad()
    (x @ value.t() - target).square().sum().backward()
    assert z.grad is not None and f.grad is not None and value.grad is not None

    before = learned.position.clone()
    learned.step(value.grad, 0.001, 0.25)
    limit = (before <= scheme.qmin - 0.49) | (before >= scheme.qmax + 0.49)
    moved = (learned.position - before)[~limit]
    assert torch.allclose(moved, -0.001 * z.grad.sign()[~limit].float(), atol=1e-6)
    assert torch.equal(learned.factor, 1 - 0.25 * f.grad.sign().float())


def test_scales_stay_storable_and_keep_their_sign() -> None:
    weight, scheme = random(3, 8, 4), Scheme(2, 4)
    q = nearest(weight, scheme)
    q = QuantizedWeight(q.codes, torch.full_like(q.scale, -1e-38), None, scheme)
    learned = LearnedWeight(q, weight)
    for _ in range(50):
        learned.step(random(3, 8, 5), 0.5, 0.5)
    found = learned.quantized()
    assert bool(torch.isfinite(found.scale.float()).all()) and bool((found.scale < 0).all())
    assert int(found.codes.min()) >= scheme.qmin and int(found.codes.max()) <= scheme.qmax


def test_a_block_of_zeros_whose_scale_is_0_stays_0() -> None:
    """As bitsandbytes stores it in NF4."""
    weight, scheme = random(2, 64, 6), Scheme(4, 32, grid="nf4")
    weight[0, :32] = 0
    q = rounding_of(scheme.rules).reopen(round_to_nearest(weight, scheme, torch.bfloat16))
    learned = LearnedWeight(q, weight)
    assert float(q.scale[0, 0]) == 0 and torch.equal(learned.quantized().codes, q.codes)
    learned.step(random(2, 64, 7), 0.1, 0.1)
    assert bool((learned.quantized().dequantize(torch.float32)[0, :32] == 0).all())


def test_it_lowers_what_nearest_rounding_leaves() -> None:
    rows, width, scheme = 16, 32, Scheme(2, 16)
    mix = random(width, width, 6) * torch.linspace(0.1, 2, width)
    x = random(400, width, 7) @ mix
    weight = random(rows, width, 8)
    want = x @ weight.t()

    def loss(value: Tensor) -> float:
        return float((x.double() @ value.double().t() - want.double()).square().mean())

    start = nearest(weight, scheme)
    learned, value = LearnedWeight(start, weight), start.dequantize(torch.float32)
    least = first = loss(value)
    for step in range(300):
        learned.step((x @ value.t() - want).t() @ x, 0.003 * (1 - step / 300), 0.003 * (1 - step / 300))
        learned.value(value)
        least = min(least, loss(learned.quantized().dequantize(torch.float32)))
    assert least < 0.95 * first
