"""Rounding to nearest: how the scale is found where nobody says."""

from __future__ import annotations

import pytest
import torch

from llmq.errors import LlmqError
from llmq.grids.nearest import round_to_nearest
from llmq.grids.nf4 import quantize_nf4
from llmq.grids.scheme import Scheme

WEIGHT = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
IMPORTANCE = torch.rand(128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scheme", "usual", "calibrated"),
    [
        (Scheme(3, 32), "mse", "weighted"),
        (Scheme(8, None, grid="fp8"), "mse", "mse"),
        (Scheme(4, 64, grid="nf4"), "minmax", "minmax"),
    ],
    ids=str,
)
def test_the_usual_range_of_each_grid(scheme: Scheme, usual: str, calibrated: str) -> None:
    for importance, how in ((None, usual), (IMPORTANCE, calibrated)):
        by_default = round_to_nearest(WEIGHT, scheme, torch.bfloat16, importance=importance)
        by_name = round_to_nearest(WEIGHT, scheme, torch.bfloat16, how, importance)
        assert torch.equal(by_default.dequantize(torch.float32), by_name.dequantize(torch.float32))


def test_nf4_is_bitsandbytes_own_unless_a_search_is_asked_for() -> None:
    scheme = Scheme(4, 64, grid="nf4")
    plain, searched = (round_to_nearest(WEIGHT, scheme, torch.bfloat16, how) for how in (None, "mse"))
    want = quantize_nf4(WEIGHT, scheme, torch.bfloat16)
    assert torch.equal(plain.packed, want.packed) and torch.equal(plain.absmax, want.absmax)  # type: ignore[attr-defined]
    errors = [float((q.dequantize(torch.float32) - WEIGHT).square().sum()) for q in (plain, searched)]
    assert errors[1] < 0.95 * errors[0]


def test_a_range_that_a_grid_has_not_is_refused() -> None:
    with pytest.raises(LlmqError, match="range must be one of minmax, mse, weighted, not 'kl'"):
        round_to_nearest(WEIGHT, Scheme(8, None, grid="fp8"), torch.bfloat16, "kl")
