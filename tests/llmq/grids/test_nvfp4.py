"""NVFP4: scales that e4m3 holds, the search among their neighbours, and the scale of scales, alone and shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from tests.llmq.grids.test_mxfp import errors, sample

SCHEME = Scheme(4, 16, grid="nvfp4")
ROUNDING = rounding_of(SCHEME.rules)


def rounded(weight: Tensor, method: str = "mse") -> QuantizedWeight:
    q = round_to_nearest(weight, SCHEME, torch.bfloat16, method)
    assert isinstance(q, QuantizedWeight)
    return q


def stored(q: QuantizedWeight) -> Tensor:
    """The scales as e4m3, after checking that they are held exactly, as normal numbers."""
    assert isinstance(q.stored_scale, Tensor) and float(torch.frexp(q.stored_scale)[0]) == 0.5
    held = (q.scale * q.stored_scale).to(torch.float8_e4m3fn)
    assert torch.equal(held.float() / q.stored_scale, q.scale)
    assert bool((held.float() >= 2.0**-6).all()) and bool(held.float().isfinite().all())
    return held


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["mse", "weighted"]))
def test_no_storable_scale_is_better(seed: int, method: str) -> None:
    """From two thirds of the scale at which the largest magnitude is 6 to that at which it is 4, all are tried."""
    weight = sample(seed)
    by = torch.rand(96, generator=torch.Generator().manual_seed(seed)) if method == "weighted" else None
    found, _ = ROUNDING.find_scale(weight, SCHEME, method, by, torch.bfloat16)
    top = weight.view(8, 6, 16).abs().amax(-1)
    every = torch.unique((torch.arange(1, 120, dtype=torch.uint8).view(torch.float8_e4m3fn)).float())
    every = torch.cat([every[every >= 1][:8] * 2.0**power for power in range(-12, 8)])
    least = torch.full_like(found, torch.inf).double()
    for scale in every:
        near = (scale >= top / 6 * 0.7) & (scale <= top / 4)
        least = torch.where(near, torch.minimum(least, errors(weight, scale.expand_as(top), SCHEME, by)), least)
    assert bool((errors(weight, found, SCHEME, by) <= least * (1 + 1e-5)).all())


def test_minmax_puts_the_largest_near_six() -> None:
    weight = sample(4)
    scale, _ = ROUNDING.find_scale(weight, SCHEME, "minmax", None, torch.bfloat16)
    assert float((weight.view(8, 6, 16).abs().amax(-1) / scale / 6).sub(1).abs().max()) <= 1 / 16


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_scales_are_held_by_e4m3_at_any_size(size: float, method: str) -> None:
    weight = sample(1).clamp_(-1, 1) * size
    q = rounded(weight, method)
    stored(q)
    found = q.dequantize(torch.float32)
    assert bool(found.isfinite().all())
    if 1e-38 < size < 1e38:
        assert float((found / size - weight / size).norm() / (weight / size).norm()) < 0.15


def test_every_value_is_exact_in_bfloat16() -> None:
    q = rounded(sample(5, 64, 320))
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize(torch.float32))


def test_groups_much_smaller_than_the_largest_are_rounded_to_what_there_is() -> None:
    weight = sample(6, 4, 64)
    weight[0, :16] *= 2.0**-14
    weight[1, :16] *= 2.0**-40
    weight[2, :16] = 0
    q = rounded(weight)
    held = stored(q).float()
    assert float(held[1, 0]) == 2.0**-6 and not bool(q.codes[1, :16].any()) and not bool(q.codes[2, :16].any())
    apart = q.dequantize(torch.float32) - weight
    assert float(apart.abs().amax(1)[0]) < 0.2 * float(weight.abs().amax(1)[0])
    assert float(apart[0, :16].abs().max()) <= 0.51 * 2.0**-6 / float(q.stored_scale)
    zeros = rounded(torch.zeros(2, 32))
    assert not bool(zeros.dequantize(torch.float32).any())
    stored(zeros)


def test_joined_weights_have_one_scale_of_scales_and_the_same_values() -> None:
    weights = [sample(7, 8, 64, size) for size in (1.0, 0.2, 5.0)]
    apart = [rounded(weight) for weight in weights]
    assert len({float(q.stored_scale) for q in apart}) == 3
    joined = ROUNDING.join([replace(q, notes=("a note",)) for q in apart], torch.bfloat16)
    assert len({float(q.stored_scale) for q in joined if isinstance(q, QuantizedWeight)}) == 1
    for alone, shared in zip(apart, joined, strict=True):
        assert isinstance(shared, QuantizedWeight) and shared.notes == ("a note",)
        stored(shared)
        assert torch.equal(alone.dequantize(torch.float32), shared.dequantize(torch.float32))


def test_a_reopened_weight_has_scales_that_can_move() -> None:
    q = rounded(sample(8))
    assert ROUNDING.reopen(q).stored_scale is None
    moved = replace(ROUNDING.reopen(q), scale=ROUNDING.storable(q.scale * 1.3, torch.float32))
    again = ROUNDING.finish(moved, torch.bfloat16)
    assert isinstance(again, QuantizedWeight)
    stored(again)


def test_infinities_are_refused() -> None:
    for bad in (float("inf"), -float("inf"), float("nan")):
        weight = sample(9)
        weight[0, 0] = bad
        with pytest.raises(LlmqError, match="not finite"):
            rounded(weight)
