"""Columns that are rounded in one kernel: each as it would be alone, given what was done to those before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.grids.scheme import Scheme
from llmq.numerics.gptq import solve

pytest.importorskip("triton")
from llmq_kernels.triton.columns import COLUMNS, recode_columns, round_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(128, 48), (37, 5), (1, 17), (128, 1), (16, 33)]
NEAR = 0.5 + 1e-4


def draw(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block of columns, coefficients as a part of a larger matrix, and scales of both signs."""
    generator = torch.Generator().manual_seed(columns * rows)
    block = torch.randn(columns, rows, generator=generator) * 0.1
    coefficients = torch.randn(columns, columns + 7, generator=generator)[:, :columns] * 0.1
    scale = torch.rand(columns, rows, generator=generator) * 0.02 + 0.01
    return block, coefficients, scale * torch.randint(0, 2, scale.shape, generator=generator).mul_(2).sub_(1)


def behind(coefficients: Tensor, changes: Tensor) -> Tensor:
    """What the changes of all columns take from each of those behind them, float64."""
    return coefficients.double().triu(1).t() @ changes.double()


def check_nearest(points: Tensor, wanted: Tensor, low: int, high: int) -> None:
    off = wanted.clamp(low, high) - points.double()
    assert float(off.abs().max()) <= NEAR
    assert torch.equal(points, points.round()) and low <= float(points.min()) and float(points.max()) <= high


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["scales of columns", "one scale"])
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_each_column_is_rounded_to_nearest_after_those_before(columns: int, rows: int, same: bool, zeros: bool) -> None:
    block, coefficients, scale = draw(columns, rows)
    scale = scale[:1].expand(columns, -1) if same else scale
    zero = torch.randint(-4, 4, scale.shape).float() if zeros else None
    given = [None if one is None else one.to(DEVICE) for one in (block, coefficients, scale, zero)]
    points, changes = (one.cpu() for one in round_columns(*given, -8, 7))  # type: ignore[arg-type]
    now = block.double() - behind(coefficients, changes)
    lift = torch.zeros_like(points) if zero is None else zero
    check_nearest(points, now / scale.double() + lift, -8, 7)
    torch.testing.assert_close(changes.double(), now - (points - lift).double() * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_each_code_moves_to_the_best_after_those_before(columns: int, rows: int) -> None:
    gradient, coefficients, scale = draw(columns, rows)
    steps = 1 / scale
    before = torch.randint(-2, 2, gradient.shape).float()
    points = before.to(DEVICE, copy=True)
    given = [one.to(DEVICE) for one in (gradient, coefficients, scale, steps)]
    changes = recode_columns(*given, points, -2, 1).cpu()
    now = gradient.double() - behind(coefficients, changes)
    check_nearest(points.cpu(), before + now * steps, -2, 1)
    torch.testing.assert_close(changes, (points.cpu() - before) * scale)


def test_what_is_far_outside_is_clipped() -> None:
    """Scales next to 0, and weights of which float32 holds no fraction."""
    block = torch.tensor([[1e30, -1e30, 3e7, torch.inf]])
    points, _ = round_columns(block.to(DEVICE), torch.zeros(1, 1).to(DEVICE), torch.ones(1, 4).to(DEVICE), None, -8, 7)
    assert points.cpu().tolist() == [[7, -8, 7, 7]]


def test_more_columns_are_refused() -> None:
    block = torch.zeros(COLUMNS + 1, 2)
    with pytest.raises(ValueError, match="at most 128"):
        round_columns(block, torch.zeros(COLUMNS + 1, COLUMNS + 1), block, None, -8, 7)
    block = torch.ones(4, 4)
    with pytest.raises(ValueError, match="contiguous"):
        round_columns(block, block, torch.ones(4, 8)[:, ::2], None, -8, 7)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(3, 32, False), Scheme(4, None)], ids=str)
def test_gptq_is_as_good_on_a_gpu(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 512, generator=generator) @ torch.randn(512, 512, generator=generator) * 0.1
    weight, hessian = torch.randn(300, 512, generator=generator), x.t() @ x
    losses = []
    for device in ("cpu", DEVICE):
        q = solve(weight.to(device), hessian.to(device), scheme, act_order="grouped", sweeps=2)
        error = (weight - q.dequantize(torch.float32).cpu()).double()
        losses.append(float(((error @ hessian.double()) * error).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
