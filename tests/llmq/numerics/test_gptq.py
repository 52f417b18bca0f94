"""GPTQ against the dense float64 recursion of the paper, and what it does with Hessians that no text should give."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, round_to_grid, rounding_of
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.numerics.gptq import ACT_ORDERS, factorize, solve


def objective(weight: Tensor, q: QuantizedWeight, hessian: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) in float64."""
    levels = q.codes.double().unflatten(1, (q.scale.shape[1], -1))
    levels = levels if q.zero is None else levels - q.zero.unsqueeze(-1)
    error = weight.double() - (levels * q.scale.double().unsqueeze(-1)).flatten(1)
    return float(((error @ hessian.double()) * error).sum())


def problem(seed: int, rows: int, width: int, correlated: bool = False) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of random inputs: independent ones, or a few directions that all inputs share."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(4 * width, width, generator=generator)
    if correlated:
        x = x * 0.3 + torch.randn(4 * width, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    x = x * (0.2 + torch.rand(width, generator=generator) * 3)
    return weight, x.t() @ x / len(x)


def orders(hessian: Tensor, size: int, act_order: str) -> list[int]:
    """The columns in the order that the paper's variants take them."""
    diagonal = hessian.diagonal().tolist()
    columns = list(range(len(diagonal)))
    if act_order == "none":
        return columns
    if act_order == "static":
        return sorted(columns, key=lambda k: -diagonal[k])
    mass = hessian.diagonal().view(-1, size).sum(1).tolist()
    return sorted(columns, key=lambda k: (-mass[k // size], -diagonal[k]))


def follow(weight: Tensor, hessian: Tensor, q: QuantizedWeight, act_order: str, method: str) -> None:
    """GPTQ as in the paper, in float64, one column at a time with the whole inverse, following the codes of `q`.

    After column k is rounded, the others move by −(w_k − ŵ_k) / [H⁻¹]_kk · [H⁻¹]_k: and k is eliminated from the
    inverse. Following instead of choosing keeps one tie from spoiling the rest: every code must be the nearest to its
    compensated weight, but for rounding, and every range the one that the compensated (static: the original) weights
    ask for.
    """
    scheme, width = q.scheme, weight.shape[1]
    size = scheme.group_size or width
    order = orders(hessian, size, act_order)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(width, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    current, total = weight.double().clone(), 0.0
    ranged: set[int] = set()
    for index, k in enumerate(order):
        group = k // size
        if group not in ranged:
            ranged.add(group)
            if method == "minmax":  # The searches are compared where they are tested: they amplify the last bit.
                source = (weight if act_order == "static" else current)[:, group * size : (group + 1) * size]
                scale, _ = find_range(source.float(), replace(scheme, group_size=None), method, None, torch.float32)
                torch.testing.assert_close(q.scale[:, group], scale[:, 0], rtol=1e-3, atol=1e-6)
        s = q.scale[:, group].double()
        z = torch.zeros_like(s) if q.zero is None else q.zero[:, group].double()
        code = q.codes[:, k].double()
        distance = (current[:, k] / s + z).clamp(scheme.qmin, scheme.qmax) - code
        assert float(distance.abs().max()) < 0.5 + 2e-4 * 2**scheme.bits
        error = current[:, k] - (code - z) * s
        total += float(error.square().sum() / inverse[k, k])
        rest = order[index + 1 :]
        current[:, rest] -= torch.outer(error / inverse[k, k], inverse[k, rest])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    assert total == pytest.approx(objective(weight, q, damped), rel=1e-5)


CASES = list(itertools.product((True, False), ACT_ORDERS, (8, 24, None), (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_and_range_is_the_papers(bits: int) -> None:
    for case, (symmetric, act_order, size, correlated) in enumerate(CASES):
        weight, hessian = problem(100 * bits + case, 4, 48, correlated)
        method = ("minmax", "weighted", "mse")[(bits + case // 2) % 3]
        scheme = Scheme(bits, size, symmetric)
        q = solve(
            weight, hessian, scheme, range_method=method, act_order=act_order, block_size=20, scale_dtype=torch.float32
        )
        assert q.notes == ()
        follow(weight, hessian, q, act_order, method)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_block_size_does_not_matter(act_order: str) -> None:
    weight, hessian = problem(0, 8, 96, True)
    options = {"range_method": "mse", "act_order": act_order, "scale_dtype": torch.float32}
    results = [solve(weight, hessian, Scheme(4, 16), block_size=size, **options) for size in (16, 40, 96, 1000)]
    costs = [objective(weight, q, hessian) for q in results]
    assert costs == pytest.approx([costs[0]] * 4, rel=1e-3)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_better_than_rounding_to_nearest(act_order: str) -> None:
    weight, hessian = problem(1, 16, 96, True)
    scheme = Scheme(3, 32)
    scale, zero = find_range(weight, scheme, "mse")
    nearest = QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)
    got = solve(weight, hessian, scheme, act_order=act_order)
    assert objective(weight, got, hessian) < 0.5 * objective(weight, nearest, hessian)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_left_as_they_were(dtype: torch.dtype) -> None:
    weight, hessian = problem(2, 8, 64)
    weight = weight.to(dtype)
    weight_before, hessian_before = weight.clone(), hessian.clone()
    q = solve(weight, hessian, Scheme(4, 32), scale_dtype=dtype)
    assert q.scale.dtype == dtype
    assert torch.equal(weight, weight_before) and torch.equal(hessian, hessian_before)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_inputs_are_rounded_and_change_nothing_else(act_order: str, symmetric: bool) -> None:
    weight, hessian = problem(3, 6, 64, True)
    dead = torch.tensor([0, 5, 17, 18, 19, 20, 21, 22, 23, 24, 40, 63])
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, dead] *= 0.5
    q = solve(weight, hessian, Scheme(4, 8, symmetric), act_order=act_order, range_method="minmax")
    assert q.notes == ()
    step = q.scale.float().abs().repeat_interleave(8, 1)
    assert bool(((q.dequantize(torch.float32) - weight).abs() <= 0.51 * step)[:, dead].all())
    other = weight.clone()
    other[:, dead] *= 0.9
    again = solve(other, hessian, Scheme(4, None, symmetric), act_order=act_order, range_method="minmax")
    base = solve(weight, hessian, Scheme(4, None, symmetric), act_order=act_order, range_method="minmax")
    live = [k for k in range(64) if k not in dead.tolist()]
    assert torch.equal(again.codes[:, live], base.codes[:, live])
    assert solve(weight, torch.zeros(64, 64), Scheme(4, 8, symmetric), act_order=act_order).notes == ()


def nearest(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, "weighted", hessian.diagonal())
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_damping_grows_when_the_hessian_is_not_positive_definite(sweeps: int) -> None:
    weight, hessian = problem(4, 6, 32, True)
    hessian /= torch.outer(hessian.diagonal(), hessian.diagonal()).sqrt()
    values, vectors = torch.linalg.eigh(hessian)
    hessian -= (values[0] + 0.05) * torch.outer(vectors[:, 0], vectors[:, 0])
    q = solve(weight, hessian, Scheme(4, 8), sweeps=sweeps)
    assert q.notes == ("the Hessian was not positive definite: damping raised from 0.01 to 0.1",)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(32)
    assert objective(weight, q, damped) <= objective(weight, nearest(weight, hessian, q.scheme), damped)
    assert float((q.dequantize(torch.float32) - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize("sweeps", [0, 2])
def test_eigenvalues_are_clipped_when_no_damping_helps(sweeps: int) -> None:
    weight, hessian = problem(5, 6, 32)
    hessian = hessian - 3000 * torch.ones(32, 32) + 3000 * torch.eye(32)
    q = solve(weight, hessian, Scheme(4, 8), sweeps=sweeps)
    assert q.notes == ("the Hessian was not positive definite with damping 100: its eigenvalues were clipped",)
    values, vectors = torch.linalg.eigh(hessian.double())
    clipped = (vectors * values.clamp_min(0.01 * float(hessian.diagonal().mean()))) @ vectors.t()
    assert objective(weight, q, clipped) <= objective(weight, nearest(weight, hessian, q.scheme), clipped)
    assert float((q.dequantize(torch.float32) - weight).norm() / weight.norm()) < 0.5


@pytest.mark.parametrize("entry", [-5.0, 0.0])
def test_a_diagonal_that_no_inputs_give_is_not_descended(entry: float) -> None:
    weight, hessian = problem(9, 6, 32, True)
    hessian[3, 3] = entry
    plain, swept = (solve(weight, hessian, Scheme(4, 8), sweeps=sweeps) for sweeps in (0, 2))
    assert torch.equal(swept.codes, plain.codes) and torch.equal(swept.scale, plain.scale)


def test_rounding_to_nearest_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.numerics.gptq.invert_factor", lambda matrix: False)
    weight, hessian = problem(6, 6, 32)
    q = solve(weight, hessian, Scheme(4, 8), range_method="mse")
    assert len(q.notes) == 2 and "clipped" in q.notes[0] and "rounded to nearest" in q.notes[1]
    scale, zero = find_range(weight, q.scheme, "mse")
    assert torch.equal(q.codes, round_to_grid(weight, scale, zero, q.scheme))


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, RuntimeError])
def test_eigenvalues_that_are_not_found_mean_rounding_to_nearest(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def eigh(matrix: Tensor) -> None:
        raise error("failed to converge\nand more")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    weight, hessian = problem(5, 6, 32)
    hessian = hessian - 3000 * torch.ones(32, 32) + 3000 * torch.eye(32)
    q = solve(weight, hessian, Scheme(4, 8), sweeps=2)
    assert q.notes == (
        "the Hessian was not positive definite with damping 100 and its eigenvalues were not found (failed to "
        "converge): rounded to nearest instead of GPTQ",
    )
    assert torch.equal(q.codes, nearest(weight, hessian, q.scheme).codes)


def test_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem(7, 1, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    factor, notes = factorize(hessian, order, 0.0)
    assert factor is not None and notes == ()
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(hessian[order][:, order].double()).float()
    torch.testing.assert_close(factor.t() @ factor, inverse, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    weight, hessian = problem(8, 4, 32)
    for broken in (weight.clone(), hessian.clone()):
        broken[2, 3] = float("inf")
        pair = (broken, hessian) if broken.shape == weight.shape else (weight, broken)
        with pytest.raises(LlmqError, match="not finite"):
            solve(*pair, Scheme(4, 8))
    with pytest.raises(LlmqError, match="does not divide"):
        solve(weight, hessian, Scheme(4, 24))
    with pytest.raises(LlmqError, match="act_order must be one of"):
        solve(weight, hessian, Scheme(4, 8), act_order="group")
    with pytest.raises(LlmqError, match=r"needs a Hessian \[32, 32\]"):
        solve(weight, hessian[:16, :16], Scheme(4, 8))


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_scales_that_are_found_together_are_those_of_their_own_groups(act_order: str) -> None:
    scheme = Scheme(4, 32, False, "q4_k")
    weight, hessian = problem(4, 3, 512, correlated=True)
    rounding = rounding_of(scheme.rules)
    q = solve(weight, hessian, scheme, act_order=act_order, range_method="minmax")
    found, _ = rounding.find_scale(weight, scheme, "minmax", None, torch.float32)
    heavier = int(hessian.diagonal().view(2, 256).sum(1).argmax()) if act_order == "grouped" else 0
    first = slice(8 * heavier, 8 * heavier + 8)
    assert torch.equal(q.scale[:, first], found[:, first])
    # The others are those of the compensated weights.
    assert torch.equal(q.scale, found) == (act_order == "static")
    plain = rounding.round(weight, scheme, torch.float32, "weighted", hessian.diagonal()).dequantize(torch.float32)
    error = (weight - plain).double()
    swept = solve(weight, hessian, scheme, act_order=act_order, sweeps=2).dequantize(torch.float32).double() - weight
    losses = [float(((one @ hessian.double()) * one).sum()) for one in (swept, error)]
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("scheme", [Scheme(4, 8), Scheme(3, 8, symmetric=False), Scheme(4, 16, grid="nvfp4")], ids=str)
def test_pieces_of_rows_are_what_they_are_alone(monkeypatch: pytest.MonkeyPatch, scheme: Scheme) -> None:
    """Where rows can be rounded apart; what has one scale for all of a weight is in one piece."""
    weight, hessian = problem(5, 21, 32)
    whole = solve(weight, hessian, scheme, sweeps=1)
    monkeypatch.setattr("llmq.grids.base.ROWS", 8)
    found = solve(weight, hessian, scheme, sweeps=1)
    assert found.codes.shape == (21, 32) and found.scale.shape == whole.scale.shape
    if scheme.rules.name == "nvfp4":
        assert torch.equal(found.codes, whole.codes)
        return
    for rows in (slice(0, 8), slice(8, 16), slice(16, 21), slice(8, 21)):
        alone = solve(weight[rows], hessian, scheme, sweeps=1)
        assert torch.equal(alone.codes, found.codes[rows]) and torch.equal(alone.scale, found.scale[rows])
    assert objective(weight, found, hessian) == pytest.approx(objective(weight, whole, hessian), rel=1e-2)
