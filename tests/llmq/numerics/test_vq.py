"""Vector quantization of one matrix: its parts against float64 and brute force; the objective never rises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight
from llmq.numerics import vq
from llmq.numerics.gptq import factorize
from llmq.numerics.vq import solve

TWO = Scheme(2, 8, grid="vq")


def problem(rows: int, width: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(4 * width, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return torch.randn(rows, width, generator=draw), x.t() @ x / len(x)


def objective(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    error = weight.double() - value.double()
    return float(((error @ hessian.double()) * error).sum())


def state(weight: Tensor, entries: int, count: int, size: int) -> vq._Vectors:
    draw = torch.Generator().manual_seed(7)
    books = torch.randn(count, entries, size, generator=draw)
    made = vq._Vectors(weight, torch.rand(len(weight), generator=draw) + 0.5, books, entries)
    made.codes.copy_(torch.randint(0, entries, made.codes.shape, generator=draw))
    return made


def value(made: vq._Vectors) -> Tensor:
    return (made._values(made.books, made.codes) * made.scale).t()


def test_the_last_group_is_the_best_of_all_entries_with_what_was_fed_forward() -> None:
    """Two groups, four entries: the first as its own cost says, the second as exhaustive search given the first."""
    weight, hessian = problem(5, 4)
    made = state(weight, 4, 1, 2)
    factor, _ = factorize(hessian, torch.arange(4), 1e-6)
    assert factor is not None
    made.feed_forward(factor, torch.arange(2))
    books, scale = made.books[0].double(), made.scale.double()
    for row in range(5):
        costs = {}
        for pair in itertools.product(range(4), repeat=2):
            left = weight[row].double() - torch.cat([books[code] for code in pair]) * scale[row]
            costs[pair] = float(left @ hessian.double() @ left)
        first, second = made.codes[:, row, 0].tolist()
        assert costs[first, second] == pytest.approx(min(costs[first, code] for code in range(4)))
        rest = torch.linalg.inv(torch.linalg.inv(hessian.double())[:2, :2])
        alone = [float((e := weight[row, :2].double() - books[code] * scale[row]) @ rest @ e) for code in range(4)]
        assert alone[first] == pytest.approx(min(alone), rel=1e-4)


def test_descent_ends_where_no_single_group_can_be_better() -> None:
    weight, hessian = problem(6, 8)
    made = state(weight, 4, 2, 2)
    before = objective(weight, value(made), hessian)
    for _ in range(20):
        told, gradient = made.descend(hessian)
    after = objective(weight, value(made), hessian)
    assert told == pytest.approx(after, rel=1e-5)
    assert torch.allclose(gradient, hessian @ (weight - value(made)).t(), atol=1e-4 * float(hessian.abs().amax()))
    assert after < before
    for group, row in itertools.product(range(4), range(6)):
        kept = made.codes[group, row].clone()
        for pair in itertools.product(range(4), repeat=2):
            made.codes[group, row] = torch.tensor(pair)
            assert objective(weight, value(made), hessian) > after * (1 - 1e-4)
        made.codes[group, row] = kept


def test_codebooks_and_scales_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(40, 16)
    made = state(weight, 3, 2, 4)
    monkeypatch.setattr(vq, "STEPS", 200)
    made._refit(hessian, made.gradient(hessian)[1])
    root = torch.linalg.cholesky(hessian.double())
    columns = []
    for entry in torch.eye(made.books.numel()).view(-1, *made.books.shape):
        columns.append((root.t() @ (made._values(entry, made.codes) * made.scale).double()).flatten())
    matrix, right = torch.stack(columns, 1), (root.t() @ weight.t().double()).flatten()
    best = torch.linalg.lstsq(matrix, right, driver="gelsd").solution
    least = float((matrix @ best - right).square().sum())
    assert objective(weight, value(made), hessian) == pytest.approx(least, rel=1e-3)
    monkeypatch.setattr(vq, "STEPS", 0)
    made._rescale(hessian, made.gradient(hessian)[1])
    plain = made._values(made.books, made.codes).t().double()
    want = ((weight.double() @ hessian.double()) * plain).sum(1) / ((plain @ hessian.double()) * plain).sum(1)
    good = want > 0  # a scale stays positive
    assert torch.allclose(made.scale.double()[good], want[good], rtol=1e-3) and 10 < int(good.sum()) < 40


def test_codebooks_fitted_to_some_of_the_rows_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(256, 16)
    values = []
    for fitted in (1 << 17, 256):
        monkeypatch.setattr(vq, "FITTED", fitted)
        made = state(weight, 4, 1, 4)
        assert (made.some.step or 1) == (1024 // fitted or 1)
        before = objective(weight, value(made), hessian)
        made._refit(hessian, made.gradient(hessian)[1])
        values.append(objective(weight, value(made), hessian))
        assert values[-1] < 0.8 * before
    assert values[0] < values[1] < 1.1 * values[0]


def test_the_objective_never_rises_and_is_far_below_rounding() -> None:
    weight, hessian = problem(96, 64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    values = []
    for rounds in (0, 1, 3):
        found = solve(weight, hessian, TWO, rounds=rounds, scale_dtype=torch.float32)
        values.append(objective(weight, found.dequantize(torch.float32), damped))
    assert values[0] >= values[1] >= values[2]
    plain = round_to_nearest(weight, TWO, torch.float32).dequantize(torch.float32)
    assert values[2] < 0.5 * objective(weight, plain, damped)


def test_two_runs_are_equal_and_the_hessian_is_as_before() -> None:
    weight, hessian = problem(16, 32)
    before = hessian.clone()
    one, two = (solve(weight.bfloat16(), hessian, TWO) for _ in range(2))
    assert torch.equal(hessian, before) and isinstance(one, VQWeight) and not one.notes
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("codes", "codebooks", "scale"))


def test_hessians_that_no_text_should_give() -> None:
    weight, hessian = problem(8, 16)
    for odd in (torch.zeros(16, 16), -torch.eye(16)):
        found = solve(weight, odd, TWO)
        assert bool(found.dequantize(torch.float32).isfinite().all())
    dead = hessian.clone()
    dead[3] = dead[:, 3] = 0
    assert bool(solve(weight, dead, TWO).dequantize(torch.float32).isfinite().all())
    with pytest.raises(LlmqError, match="needs a Hessian"):
        solve(weight, hessian[:8, :8], TWO)
    with pytest.raises(LlmqError, match="not finite"):
        solve(weight, hessian * float("nan"), TWO)
    with pytest.raises(LlmqError, match="does not divide"):
        solve(weight[:, :12], hessian[:12, :12], TWO)
