"""The corrected weight against a dense float64 solution of its objective, and the choice of strengths."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme
from llmq.numerics.correction import STEPS, Fit, change, factor
from llmq.numerics.gptq import solve

DAMPING = 0.01


class Problem(NamedTuple):
    """Inputs and streams of both chains, float64, and a weight."""

    weight: Tensor
    x: Tensor
    now: Tensor
    r: Tensor
    r_now: Tensor

    def error(self, weight: Tensor) -> float:
        """‖X̂ W'ᵀ + R̂ − (X Wᵀ + R)‖²."""
        return float((self.now @ weight.t() + self.r_now - self.x @ self.weight.t() - self.r).square().sum())


def problem(seed: int) -> Problem:
    """Random sizes, correlated inputs, and a chain that is off by up to a third."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, width = (int(torch.randint(low, 17, (), generator=generator)) for low in (1, 2))
    tokens = width * int(torch.randint(2, 9, (), generator=generator))
    x = random(tokens, width) + random(tokens, 2) @ random(2, width)
    r = random(tokens, rows)
    off = 0.3 * float(torch.rand((), generator=generator))
    return Problem(random(rows, width), x, x + off * random(tokens, width), r, r + off * random(tokens, rows))


def corrected(given: Problem) -> Tensor:
    """As the code computes it, in float32."""
    weight, x, now, r, r_now = (part.float() for part in given)
    hessian = now.t() @ now
    lower = factor(hessian, DAMPING)
    assert lower is not None
    return weight + change(weight @ ((x - now).t() @ now) + (r - r_now).t() @ now, lower)


@pytest.mark.parametrize("seed", range(200))
def test_it_is_the_least_squares_solution(seed: int) -> None:
    given = problem(seed)
    width = given.weight.shape[1]
    amount = DAMPING * float((given.now.t() @ given.now).diagonal().mean())
    rows = torch.cat([given.now, amount**0.5 * torch.eye(width, dtype=torch.float64)])
    wanted = given.x @ given.weight.t() + given.r - given.r_now
    ridge = amount**0.5 * given.weight.t()
    solution = torch.linalg.lstsq(rows, torch.cat([wanted, ridge])).solution.t()
    torch.testing.assert_close(corrected(given).double(), solution, rtol=2e-3, atol=2e-3)
    assert given.error(corrected(given).double()) <= given.error(given.weight) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(0, 200, 4))
def test_rounding_it_by_the_hessian_minimizes_the_whole_objective(seed: int) -> None:
    given = problem(seed)
    hessian = given.now.t() @ given.now
    exact = torch.linalg.lstsq(given.now, given.x @ given.weight.t() + given.r - given.r_now).solution.t()
    q = solve(exact.float(), hessian.float(), Scheme(3, None), sweeps=2, scale_dtype=torch.float32)
    rounded = rounding_of(q.scheme.rules).finish(q, torch.float32).dequantize(torch.float32).double()
    away = exact - rounded
    torch.testing.assert_close(
        given.error(rounded) - given.error(exact), float(((away @ hessian) * away).sum()), rtol=1e-6, atol=1e-6
    )
    plain = solve(given.weight.float(), hessian.float(), Scheme(3, None), sweeps=2, scale_dtype=torch.float32)
    uncorrected = rounding_of(plain.scheme.rules).finish(plain, torch.float32).dequantize(torch.float32).double()
    # Either is a heuristic on its own objective: rarely is the plain one the better rounding of both.
    assert given.error(rounded) <= 1.25 * given.error(uncorrected)


def test_a_hessian_without_a_factor() -> None:
    assert factor(torch.zeros(4, 4), DAMPING) is None
    assert factor(torch.full((4, 4), float("nan")), DAMPING) is None
    singular = torch.ones(4, 4)
    assert factor(singular, DAMPING) is not None
    # Damping is raised until it has one.
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.2]))
    inverse = factor(indefinite, DAMPING)
    assert inverse is not None
    lower = torch.linalg.inv(inverse)
    added = (lower @ lower.t() - indefinite).diagonal()
    torch.testing.assert_close(added, torch.full((4,), 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_strengths_are_the_best_of_the_grid(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    changes = [torch.randn(40, 5, generator=generator) for _ in range(count)]
    wanted = torch.randn(40, 5, generator=generator)
    for share in (0.3, 0.8):
        wanted = wanted + share * changes[-1]
    fit = Fit(count)
    for part in range(4):
        rows = slice(10 * part, 10 * part + 10)
        fit.update([one[rows] for one in changes], wanted[rows])
    steps = [i / STEPS for i in range(STEPS + 1)]
    tried = [(s,) for s in steps] if count == 1 else [(s, t) for s in steps for t in steps]

    def error(strengths: tuple[float, ...]) -> float:
        made = sum((s * one for s, one in zip(strengths, changes, strict=True)), torch.zeros(40, 5))
        return float((made - wanted).double().square().sum())

    assert fit.strengths() == min(tried, key=error)


def test_what_does_not_help_has_no_strength() -> None:
    fit = Fit(2)
    fit.update([torch.ones(3, 2), torch.zeros(3, 2)], torch.full((3, 2), -1.0))
    assert fit.strengths() == (0.0, 0.0)


def test_overflow_is_told() -> None:
    fit = Fit(1)
    fit.update([torch.full((3, 2), float("inf"))], torch.ones(3, 2))
    with pytest.raises(LlmqError, match="overflowed"):
        fit.strengths()
