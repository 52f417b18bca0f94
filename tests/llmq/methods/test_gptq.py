"""GPTQ as a method: its options reach the arithmetic, which is the paper's; what it refuses and how much it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.block.statistics import Hessian
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.grids.table import EACH
from llmq.methods.gptq import GPTQ
from llmq.numerics.gptq import solve
from tests.llmq.refusal import refused

SCHEME = Scheme(3, 8)


def problem(width: int = 32) -> tuple[Tensor, Hessian]:
    """A weight and the Hessian of inputs that go together, some of them larger."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, width, generator=draw)
    mix = torch.randn(width, width, generator=draw) * (0.2 + torch.rand(width, generator=draw) * 3)
    hessian = Hessian(width, torch.device("cpu"))
    hessian.update(torch.randn(4 * width, width, generator=draw) @ mix)
    return weight, hessian


def quantized(method: GPTQ, scheme: Scheme = SCHEME, width: int = 32) -> QuantizedWeight:
    weight, hessian = problem(width)
    found = method.quantize(weight, scheme, {Hessian: hessian}, torch.float32)
    assert isinstance(found, QuantizedWeight)
    return found


def test_algorithm_1_of_the_paper() -> None:
    """A scale for each row by min-max, columns as they stand, by numpy in float64 with the whole inverse."""
    got = quantized(GPTQ(range="minmax", act_order="none", sweeps=0, correct="none"), Scheme(4, None))
    weight, hessian = problem()
    w, h = weight.double().numpy().copy(), hessian.total.double().numpy()
    scale = np.abs(w).max(1) / 7.5
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(32))
    upper = np.linalg.cholesky(inverse).T
    codes = np.zeros_like(w)
    for k in range(32):
        codes[:, k] = np.clip(np.round(w[:, k] / scale), -8, 7)
        error = (w[:, k] - codes[:, k] * scale) / upper[k, k]
        w[:, k:] -= np.outer(error, upper[k, k:])
    assert np.allclose(got.scale[:, 0].numpy(), scale, rtol=1e-6)
    assert np.mean(got.codes.numpy() == codes) > 0.99


USUAL: dict[str, Any] = {"range": "weighted", "act_order": "grouped", "damping": 0.05, "sweeps": 2}
CHANGES: list[dict[str, Any]] = [{}, {"range": "mse"}, {"act_order": "none"}, {"damping": 0.4}, {"sweeps": 0}]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_each_option_reaches_the_arithmetic(changed: dict[str, Any]) -> None:
    weight, hessian = problem()
    more = USUAL | changed
    want = solve(weight, hessian.total, SCHEME, range_method=more.pop("range"), scale_dtype=torch.float32, **more)
    got = quantized(GPTQ(**changed))
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scale, want.scale)
    usual = quantized(GPTQ())
    assert torch.equal(got.codes, usual.codes) is not bool(changed)


def test_damping_is_larger_where_weights_are_corrected() -> None:
    assert GPTQ().damping == GPTQ(correct="full").damping == 0.05
    assert GPTQ(correct="none").damping == 0.01
    assert GPTQ(correct="none", damping=0.2).damping == GPTQ(damping=0.2).damping == 0.2


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, None, grid="fp8"), Scheme(4, 64, grid="nf4")], ids=str)
def test_it_gives_what_the_grid_stores(scheme: Scheme) -> None:
    weight, hessian = problem(64)
    method = GPTQ(range="mse")
    found = method.quantize(weight, scheme, {Hessian: hessian}, torch.bfloat16)
    assert type(found) is type(round_to_nearest(weight, scheme, torch.bfloat16)) and found.scheme == scheme
    assert method.refusal(scheme) is None and method.grids() == EACH


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"range": "wieghted"}, ("range", "did you mean 'weighted'")),
        ({"correct": "heldout"}, ("correct", "did you mean 'held-out'")),
        ({"sweeps": -1}, ("sweeps must be 0 or more, not -1",)),
        ({"damping": 0.0}, ("damping must lie between 0 and 1, not 0.0",)),
        ({"damping": 1.0}, ("damping must lie between 0 and 1, not 1.0",)),
        ({"damping": float("nan")}, ("damping must lie between 0 and 1",)),
    ],
)
def test_an_option_that_cannot_be(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: GPTQ(**options), *words)


def test_what_a_grid_has_not_and_what_was_not_taken_is_refused() -> None:
    nf4 = Scheme(4, 64, grid="nf4")
    said = GPTQ(range="percentile").refusal(nf4)
    assert said == "scales of nf4 g64 are found by minmax, mse, weighted, not by --range percentile"
    assert GPTQ(range="percentile").refusal(Scheme()) is None
    refused(lambda: GPTQ().quantize(torch.ones(2, 8), SCHEME, {}, torch.float32), "no Hessian statistic was collected")


@pytest.mark.parametrize(("shape", "needed"), [((8, 64), 4 * 64 * 64 + 5 * 8 * 64), ((64, 8), 18 * 64 * 8)])
def test_its_workspace_is_the_larger_of_factoring_and_rounding(shape: tuple[int, int], needed: int) -> None:
    assert GPTQ().workspace(shape) == needed


def test_its_hessian_rests_while_it_is_factored() -> None:
    """Where the statistics take most, they are in memory with what sweeps take, not with a factor of them."""
    square, matrix = 4 * 64 * 64, 8 * 64
    assert GPTQ().together((8, 64), square) == square + 18 * matrix
    assert GPTQ(sweeps=0).together((8, 64), square) == square + 5 * matrix
    assert GPTQ(sweeps=0).workspace((64, 8)) == 4 * 8 * 8 + 5 * 64 * 8
