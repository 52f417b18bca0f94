"""Triangles by matrix products: as accurate as LAPACK's routines, at sizes below, at and between those of parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.numerics import cholesky
from llmq.numerics.cholesky import invert_factor, solve, times_lower, times_upper


def problem(size: int, damping: float = 1e-3) -> Tensor:
    """A Hessian of inputs of very different sizes, float64."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    rows *= torch.exp(torch.randn(size, generator=generator, dtype=torch.float64))
    gram = rows.t() @ rows
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1, 31, 256, 257, 700])
def test_the_inverse_of_the_factor(size: int) -> None:
    gram = problem(size)
    wanted = torch.linalg.inv(torch.linalg.cholesky(gram))
    found = gram.float()
    found[torch.triu_indices(size, size, 1).unbind()] = torch.nan
    assert invert_factor(found), "only the lower triangle is read"
    assert bool((found.triu(1) == 0).all())
    unit = torch.eye(size)
    lapack = torch.linalg.solve_triangular(torch.linalg.cholesky(gram.float()), unit, upper=False)
    assert apart(found, wanted) < max(2 * apart(lapack, wanted), 1e-6)
    rows = torch.randn(5, size, dtype=torch.float64)
    assert apart(solve(rows.float(), found), rows @ torch.linalg.inv(gram)) < 1e-3
    assert apart(times_upper(rows.float(), found), rows @ wanted.t()) < 1e-4


@pytest.mark.parametrize("place", [0, 200, 299])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_matrix_without_a_factor(place: int, value: float) -> None:
    gram = problem(300).float()
    gram[place, place] = value
    assert not invert_factor(gram)


def test_strips_of_a_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "STRIP", 7)
    lower, rows = torch.randn(20, 20).tril(), torch.randn(3, 20)
    torch.testing.assert_close(times_lower(rows, lower), rows @ lower)
    torch.testing.assert_close(times_upper(rows, lower), rows @ lower.t())
    monkeypatch.setattr(cholesky, "SMALL", 3)
    gram = problem(20)
    found = gram.float()
    assert invert_factor(found)
    assert apart(found, torch.linalg.inv(torch.linalg.cholesky(gram))) < 1e-5
