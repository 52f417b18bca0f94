"""Revisiting scales and codes only ever lowers the objective, and ends where no single step helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.base import QuantizedWeight, round_to_grid, rounded_on, rounding_of
from llmq.grids.kquants import MULTIPLES
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.numerics.descent import improve
from llmq.numerics.gptq import solve


def problem(seed: int, width: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=generator)
    x = x * 0.3 + torch.randn(400, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return torch.randn(6, width, generator=generator), x.t() @ x / len(x)


def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, "mse", None, dtype)
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme, ("a note",))


def losses(weight: Tensor, q: QuantizedWeight, hessian: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of every row, in float64."""
    error = weight.double() - q.dequantize(torch.float32).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.builds(Scheme, st.integers(2, 8), st.sampled_from([8, 24, None]), st.booleans()),
    st.integers(0, 2**31),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_every_sweep_lowers_every_row(scheme: Scheme, seed: int, dtype: torch.dtype) -> None:
    weight, hessian = problem(seed)
    q = nearest(weight, scheme, dtype)
    for _ in range(3):
        better = improve(q, weight, hessian, sweeps=1, damping=0.0, block_size=20)
        assert better.scale.dtype == dtype and better.notes == q.notes and better.scheme == scheme
        assert scheme.qmin <= int(better.codes.min()) and int(better.codes.max()) <= scheme.qmax
        assert bool((losses(weight, better, hessian) <= losses(weight, q, hessian) * (1 + 1e-4) + 1e-7).all())
        q = better


@pytest.mark.parametrize("scheme", [Scheme(4, 16, grid="nvfp4"), Scheme(4, 32, grid="mxfp4")], ids=str)
def test_scales_stay_those_that_the_grid_can_store(scheme: Scheme) -> None:
    weight, hessian = problem(1, 64)
    rounding = rounding_of(scheme.rules)
    q = rounded_on(weight, *rounding.find_scale(weight, scheme, "minmax", None, torch.bfloat16), scheme)
    better = improve(q, weight, hessian, sweeps=3, damping=0.0)
    assert torch.equal(rounding.storable(better.scale, torch.float32), better.scale)
    assert scheme.grid == "mxfp4" or not torch.equal(better.scale, q.scale)
    assert bool((losses(weight, better, hessian) <= losses(weight, q, hessian)).all())


@pytest.mark.parametrize("scheme", [Scheme(2, 16, False, "q2_k"), Scheme(3, 16, grid="q3_k")], ids=str)
def test_scales_that_are_multiples_move_to_others(scheme: Scheme) -> None:
    weight, hessian = problem(1, 512)
    rounding = rounding_of(scheme.rules)
    q = rounded_on(weight, *rounding.find_scale(weight, scheme, "minmax", None, torch.bfloat16), scheme)
    better = improve(q, weight, hessian, sweeps=2, damping=0.0)
    before, after = (one.stored_scale for one in (q, better))
    assert torch.equal(after.d, before.d) and not torch.equal(after.whole, before.whole)
    lowest, highest = MULTIPLES[scheme.bits]
    assert lowest <= int(after.whole.min()) and int(after.whole.max()) <= highest and bool((after.whole != 0).all())
    if before.e is not None:
        assert torch.equal(after.e, before.e) and not torch.equal(after.lowest, before.lowest)
        assert int(after.lowest.min()) >= 0 and int(after.lowest.max()) <= highest
    stored = rounding.finish(better, torch.bfloat16).dequantize(torch.float32)
    assert torch.allclose(stored, better.dequantize(torch.float32), atol=1e-6)
    assert bool((losses(weight, better, hessian) <= losses(weight, q, hessian)).all())
    # After gptq, what moves ends below what is fixed.
    solved = solve(weight, hessian, scheme, act_order="grouped", sweeps=0)
    fixed = improve(replace(solved, stored_scale=()), weight, hessian, sweeps=2)
    moved = improve(solved, weight, hessian, sweeps=2)
    assert float(losses(weight, moved, hessian).sum()) < 0.99 * float(losses(weight, fixed, hessian).sum())


def test_it_ends_where_no_single_code_helps() -> None:
    weight, hessian = problem(0)
    q = improve(nearest(weight, Scheme(3, 16)), weight, hessian, sweeps=100, damping=0.0)
    best = losses(weight, q, hessian)
    for column in range(48):
        for step in (-1, 1):
            codes = q.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(-4, 3)
            other = QuantizedWeight(codes, q.scale, q.zero, q.scheme)
            assert bool((losses(weight, other, hessian) >= best * (1 - 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_gains_from_it(bits: int) -> None:
    weight, hessian = problem(bits)
    plain, swept = (solve(weight, hessian, Scheme(bits, 16), act_order="none", sweeps=sweeps) for sweeps in (0, 2))
    assert float(losses(weight, swept, hessian).sum()) < 0.95 * float(losses(weight, plain, hessian).sum())


def test_the_hessian_is_put_back() -> None:
    weight, hessian = problem(1)
    before = hessian.clone()
    improve(nearest(weight, Scheme(4, 16)), weight, hessian, sweeps=1)
    assert torch.equal(hessian, before)


def test_inputs_that_never_fired_keep_their_codes_without_damping() -> None:
    weight, hessian = problem(2)
    hessian[8:16], hessian[:, 8:16] = 0, 0
    q = nearest(weight, Scheme(4, 8))
    better = improve(q, weight, hessian, sweeps=2, damping=0.0)
    assert torch.equal(better.codes[:, 8:16], q.codes[:, 8:16]) and torch.equal(better.scale[:, 1], q.scale[:, 1])
    still = improve(q, weight, torch.zeros_like(hessian), sweeps=2)
    assert torch.equal(still.codes, q.codes)


def test_damping_takes_inputs_that_never_fired_to_the_nearest_code() -> None:
    weight, hessian = problem(2)
    hessian[8:12], hessian[:, 8:12] = 0, 0
    q = nearest(weight, Scheme(4, 8))
    off = QuantizedWeight(q.codes.clone(), q.scale, q.zero, q.scheme)
    off.codes[:, 8:12] = 0
    better = improve(off, weight, hessian, sweeps=2)
    codes = round_to_grid(weight, better.scale, better.zero, better.scheme)
    assert torch.equal(better.codes[:, 8:12], codes[:, 8:12]) and bool((codes[:, 8:12] != 0).any())


def test_no_sweeps_change_nothing() -> None:
    weight, hessian = problem(3)
    q = nearest(weight, Scheme(4, 8))
    assert improve(q, weight, hessian, sweeps=0) is q
