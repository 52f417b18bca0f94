"""A grid that is a list of levels: any five values, added here in a few lines, work with every quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids import base, codebook, scheme, table
from llmq.grids.codebook import Codebook
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics.gptq import solve
from llmq.numerics.hqq import half_quadratic
from llmq.numerics.learned_rounding import LearnedWeight

FIVE = torch.tensor([-1.0, -0.4, 0.0, 0.4, 1.0])


class Five(Codebook):
    """Five levels."""

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`."""
        return FIVE.to(device)


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> Scheme:
    """A scheme on a grid of five levels, for the time of a test."""
    row = table.Grid(
        name="five", label="five", bits=(3,), rounding=f"{__name__}:Five", format="compressed_tensors", stored_bits=2.33
    )
    monkeypatch.setitem(table.GRIDS, "five", row)
    monkeypatch.setattr(base.importlib, "import_module", lambda _: __import__("sys").modules[Five.__module__])
    base.rounding_of.cache_clear()
    yield scheme.Scheme(3, 16, grid="five")
    base.rounding_of.cache_clear()


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) @ (torch.randn(64, 64, generator=generator) * 0.3 + torch.eye(64))
    return torch.randn(12, 64, generator=generator), x, x.t() @ x / len(x)


def loss(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    error = (value - weight).double()
    return float(((error @ hessian.double()) * error).sum())


def test_every_value_is_the_best_of_all_scales(five: Scheme) -> None:
    """Against a fine search in float64 over all scales of each group."""
    weight = problem()[0]
    q = round_to_nearest(weight, five, torch.float32, "mse")
    groups = weight.double().view(12, 4, 1, 16)
    scales = groups.abs().amax(-1, keepdim=True) * torch.linspace(0.2, 1.3, 400, dtype=torch.float64).view(1, 1, -1, 1)
    near = FIVE.double()[((groups / scales).unsqueeze(-1) - FIVE.double()).abs().argmin(-1)] * scales
    least = (near - groups).square().sum(-1).amin(-1)
    got = (q.dequantize(torch.float32).double().view(12, 4, 16) - groups.squeeze(2)).square().sum(-1)
    assert float((got / least).max()) < 1.06 and float(got.sum() / least.sum()) < 1.01


def test_every_quantizer_rounds_to_it(five: Scheme) -> None:
    weight, x, hessian = problem()
    nearest = round_to_nearest(weight, five, torch.float32)
    solved = solve(weight, hessian, five, act_order="grouped", sweeps=2, scale_dtype=torch.float32)
    fitted = half_quadratic(weight, five, torch.float32, p=2.0)
    start = loss(weight, nearest.dequantize(torch.float32), hessian)
    assert loss(weight, solved.dequantize(torch.float32), hessian) < 0.6 * start
    assert loss(weight, fitted.dequantize(torch.float32), torch.eye(64)) < 1.02 * loss(
        weight, nearest.dequantize(torch.float32), torch.eye(64)
    )
    for q in (solved, fitted):
        assert int(q.codes.max()) <= 4 and torch.isin(FIVE[q.codes.int()], FIVE).all()
    learned = LearnedWeight(base.rounding_of(five.rules).reopen(nearest), weight)
    value = nearest.dequantize(torch.float32)
    best = start
    for step in range(300):
        rate = 0.004 * (1 - step / 300)
        learned.step((value - weight) @ hessian, rate, rate)
        learned.value(value)
        best = min(best, loss(weight, learned.quantized().dequantize(torch.float32), hessian))
    assert best < 0.95 * start


def test_half_way_goes_to_the_lower_level(five: Scheme) -> None:
    rounding = base.rounding_of(five.rules)
    middle = (FIVE[1:] + FIVE[:-1]) / 2
    assert torch.equal(rounding.nearest(middle.clone(), None, five), FIVE[:-1])


def test_one_sided_weights_are_covered(five: Scheme) -> None:
    weight = problem()[0].abs()
    for sign in (1, -1):
        q = round_to_nearest(sign * weight, five, torch.float32, "minmax")
        assert torch.allclose(q.scale, weight.view(12, 4, 16).amax(-1))


def test_a_group_size_that_does_not_divide_is_refused(five: Scheme) -> None:
    with pytest.raises(LlmqError, match="16 does not divide the 40 inputs"):
        codebook.Codebook.find_scale(Five(), torch.ones(2, 40), five, "mse", None, torch.float32)
