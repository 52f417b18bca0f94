"""Training through the rounding: the start, LSQ's gradients by its formula, DSQ's by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics.straight_through import SHARPNESS, Adam, TrainedWeight, soft_points

SCHEMES = [Scheme(2, 8), Scheme(3, 8, symmetric=False), Scheme(4, None), Scheme(8, None, grid="fp8")]


def start_of(scheme: Scheme) -> tuple[QuantizedWeight, Tensor]:
    """Codes that are not those of the nearest points everywhere, and the weight."""
    weight = torch.randn(6, 32)
    q = round_to_nearest(weight + 0.3 * torch.randn(6, 32), scheme, torch.bfloat16)
    assert isinstance(q, QuantizedWeight)
    return q, weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_at_the_start_bit_for_bit(scheme: Scheme) -> None:
    q, weight = start_of(scheme)
    learned = TrainedWeight(q, weight)
    out = torch.empty(6, 32, dtype=torch.bfloat16)
    learned.value(out)
    assert torch.equal(out, q.dequantize(torch.bfloat16))
    again = learned.quantized()
    assert torch.equal(again.codes, q.codes) and torch.equal(again.scale, q.scale)


def test_a_weight_whose_code_is_the_nearest_starts_at_its_own_value_others_in_the_middle_of_their_cell() -> None:
    q, weight = start_of(Scheme(3, 8))
    scale = q.scale.float().repeat_interleave(8, 1)
    nearest = (weight / scale).round().clamp(-4, 3)
    points = (q.dequantize(torch.float32) / scale).round()
    want = torch.where(nearest == points, weight / scale, points)
    assert (nearest != points).any()
    torch.testing.assert_close(TrainedWeight(q, weight).latent.flatten(1), want)


def test_the_gradients_are_those_of_lsq() -> None:
    q, weight = start_of(Scheme(3, 8))
    learned, slope = TrainedWeight(q, weight), torch.randn(6, 32)
    for _ in range(3):
        learned.step(torch.randn(6, 32), 0.3, 0.05)
    # LSQ as its authors write it down: detached rounding, the straight-through gradient by autograd.
    scale = learned.scale().detach().requires_grad_()
    float_weight = (learned.latent * learned.base).detach().requires_grad_()
    ratio = (float_weight / scale).clamp(-4, 3)
    rounded = ((ratio.round() - ratio).detach() + ratio) * scale
    wanted = torch.autograd.grad(rounded, (float_weight, scale), slope.view_as(rounded))
    mine, pull = learned.gradients(slope)
    torch.testing.assert_close(mine, wanted[0] * learned.base)
    torch.testing.assert_close(pull, wanted[1] * learned.base)


def test_the_soft_rounding_meets_every_level_and_its_slope_is_its_own() -> None:
    levels = torch.tensor([-6.0, -2.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    values = torch.linspace(-5.97, 2.97, 400, dtype=torch.float64)
    values = values[(values[:, None] - levels).abs().amin(1) > 1e-3]
    _, slope = soft_points(values, levels)
    ends = [soft_points(values + side * 1e-6, levels)[0] for side in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(soft_points(levels, levels)[0], levels)
    assert slope.max() > 1.5 > 0.6 > slope.min() and SHARPNESS == 4


def test_dsq_s_gradients_are_those_of_the_soft_rounding() -> None:
    q, weight = start_of(Scheme(3, 8))
    learned, slope = TrainedWeight(q, weight, "dsq"), torch.randn(6, 32)
    inside = (learned.latent > -4) & (learned.latent < 3)
    assert inside.float().mean() > 0.5
    slope = slope * inside.flatten(1)
    mine, pull = learned.gradients(slope)
    levels = learned.levels.double()

    def loss(latent: Tensor, factor: Tensor) -> Tensor:
        scale = learned.base.double() * factor
        soft, _ = soft_points((latent * learned.base / scale).clamp(-4, 3), levels)
        return (soft * scale * slope.double().view_as(soft)).sum()

    latent, factor, step = learned.latent.double(), learned.factor.double(), 1e-6
    for place in [(0, 0, 0), (3, 1, 5), (5, 3, 7)]:
        change = torch.zeros_like(latent)
        change[place] = step
        numeric = (loss(latent + change, factor) - loss(latent - change, factor)) / (2 * step)
        torch.testing.assert_close(mine[place].double(), numeric, rtol=1e-3, atol=1e-4)
        change = torch.zeros_like(factor)
        change[place[:2]] = step
        numeric = (loss(latent, factor + change) - loss(latent, factor - change)) / (2 * step)
        torch.testing.assert_close(pull[place[0], place[1], 0].double(), numeric, rtol=1e-3, atol=1e-3)


def test_weights_beyond_the_grid_stay_and_pull_at_the_scale() -> None:
    _, weight = start_of(Scheme(2, 8))
    weight[0, 0] = 50.0
    clamped = round_to_nearest(weight.clamp(-1, 1), Scheme(2, 8), torch.bfloat16)
    assert isinstance(clamped, QuantizedWeight)
    learned = TrainedWeight(clamped, weight)
    slope, pull = learned.gradients(torch.ones(6, 32))
    rest = learned.gradients(torch.ones(6, 32).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(0.0)))[1]
    assert slope[0, 0, 0] == 0 and slope[1, 0].any()
    assert float((pull - rest)[0, 0, 0]) == pytest.approx(float((learned.points() * learned.base)[0, 0, 0]), rel=1e-4)


def test_adam_is_torch_s() -> None:
    parameter = torch.randn(3, 4).requires_grad_()
    mine, torch_s = parameter.detach().clone(), torch.optim.Adam([parameter], 0.1, betas=(0.9, 0.99), eps=1e-30)
    own = Adam(mine)
    for _ in range(5):
        parameter.grad = torch.randn(3, 4)
        mine.sub_(own.step(parameter.grad), alpha=0.1)
        torch_s.step()
    torch.testing.assert_close(mine, parameter.detach())
