"""Integers with scales that float16 holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme

HALF, FREE = Scheme(4, 32, scales="float16"), Scheme(4, 32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def held(scale: torch.Tensor) -> bool:
    return torch.equal(scale.to(torch.float16).to(torch.float32), scale.to(torch.float32)) and bool((scale != 0).all())


@given(st.floats(1e-30, 1e6), st.sampled_from(DTYPES), st.sampled_from([1, -1]))
def test_what_can_be_stored(size: float, dtype: torch.dtype, sign: int) -> None:
    found = rounding_of(HALF.rules).storable(torch.tensor([sign * size]), dtype)
    assert held(found) and torch.equal(found.to(dtype).to(torch.float32), found) and float(found) * sign > 0
    if 2.0**-14 <= size <= 65280:
        assert float(found) == pytest.approx(sign * size, rel=2.0**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_scales_that_are_found(dtype: torch.dtype, method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128) * torch.logspace(-7, 1, 8).unsqueeze(-1)
    weight[3, 32:64] = 0
    found = rounding_of(HALF.rules).round(weight, HALF, dtype, method, None)
    free = rounding_of(FREE.rules).round(weight, FREE, dtype, method, None)
    assert held(found.scale) and found.scale.dtype == dtype  # type: ignore[attr-defined]
    away, usual = ((q.dequantize(torch.float32) - weight)[4:].square().sum(-1) for q in (found, free))
    # Larger weights lose nothing by it.
    torch.testing.assert_close(away, usual, rtol=0.02, atol=0)
