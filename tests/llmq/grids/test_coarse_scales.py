"""Scales with few bits of mantissa: rounded to the nearest that can be stored, whatever the unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.grids import base
from llmq.grids.base import rounding_of
from llmq.grids.coarse_scales import SMALLEST, CoarseScales
from llmq.grids.scheme import Scheme
from tests.llmq.grids.test_mxfp import sample

NV = Scheme(4, 16, grid="nvfp4")
POWERS = [Scheme(bits, 32, grid=f"mxfp{bits}") for bits in (4, 6, 8)]


@pytest.mark.parametrize("scheme", POWERS, ids=str)
def test_scales_are_rounded_to_the_nearest_power(scheme: Scheme) -> None:
    rounding = rounding_of(scheme.rules)
    scale = torch.tensor([1.49, 1.51, -3.1, 0.0, 1e-45, float("inf")])
    want = [1.0, 2.0, 4.0, 2.0**-126, 2.0**-126, 2.0 ** (118 if scheme.bits == 8 else 124)]
    assert rounding.storable(scale, torch.float32).tolist() == want
    assert rounding.storable(scale[:2], torch.float32, torch.tensor([4.0, 0.25])).tolist() == [1.0, 2.0]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-30, 1e30), st.sampled_from([NV, *POWERS]))
def test_the_nearest_of_all_that_can_be_stored(value: float, scheme: Scheme) -> None:
    rounding = rounding_of(scheme.rules)
    assert isinstance(rounding, CoarseScales)
    scale = torch.tensor([value], dtype=torch.float32)
    got = rounding.storable(scale, torch.float32)
    size = 2**rounding.mantissa
    below = torch.exp2(torch.frexp(scale)[1] - 1.0).double()
    every = torch.cat([below * (1 + step / size) for step in range(size + 1)])
    assert bool((every == got.double()).any())
    assert float((got.double() - scale.double()).abs()) == float((every - scale.double()).abs().min())
    assert torch.equal(rounding.storable(got, torch.float32), got)


@pytest.mark.parametrize("scheme", [NV, *POWERS], ids=str)
def test_chunks_make_no_difference(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rounding = sample(5, 33), rounding_of(scheme.rules)
    scale, _ = rounding.find_scale(weight, scheme, "mse", None, torch.bfloat16)
    assert bool((scale >= SMALLEST).all())
    monkeypatch.setattr(base, "CHUNK", 100)
    assert torch.equal(rounding.find_scale(weight, scheme, "mse", None, torch.bfloat16)[0], scale)
