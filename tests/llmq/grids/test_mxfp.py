"""Microscaling floats: scales that are powers of two, and the search among neighbours, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from tests.llmq.grids.peers import known_to_compressed_tensors

SCHEMES = [Scheme(bits, 32, grid=f"mxfp{bits}") for bits in (4, 6, 8)]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def sample(seed: int, rows: int = 8, width: int = 96, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator)) * size


def errors(weight: Tensor, scale: Tensor, scheme: Scheme, by: Tensor | None = None) -> Tensor:
    """Σ (w − ŵ)² of every group with given scales, weighted, float64 [out, groups]."""
    levels = rounding_of(scheme.rules).levels(scheme, weight.device).double()
    value, wide = weight.double().view(*scale.shape, -1), scale.double().unsqueeze(-1)
    near = levels[(value.unsqueeze(-1) / wide.unsqueeze(-1) - levels).abs().argmin(-1)] * wide
    apart = (near - value).square()
    return (apart if by is None else apart * by.double().view(1, scale.shape[1], -1)).sum(-1)


@EVERY
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["mse", "weighted"]))
def test_the_best_of_three_exponents(scheme: Scheme, seed: int, method: str) -> None:
    weight, rounding = sample(seed), rounding_of(scheme.rules)
    by = torch.rand(96, generator=torch.Generator().manual_seed(seed)) if method == "weighted" else None
    first, _ = rounding.find_scale(weight, scheme, "minmax", None, torch.bfloat16)
    found, _ = rounding.find_scale(weight, scheme, method, by, torch.bfloat16)
    assert bool((torch.frexp(found)[0] == 0.5).all()), "scales are powers of two"
    tried = torch.stack([errors(weight, first * power, scheme, by) for power in (0.5, 1.0, 2.0)])
    torch.testing.assert_close(errors(weight, found, scheme, by), tried.amin(0), rtol=1e-5, atol=0)


@EVERY
def test_minmax_is_compressed_tensors_own(scheme: Scheme) -> None:
    known_to_compressed_tensors(scheme)
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    weight = sample(3, 64, 320)
    scale, _ = rounding_of(scheme.rules).find_scale(weight, scheme, "minmax", None, torch.bfloat16)
    theirs = generate_mx_scales(weight.view(64, 10, 32).abs().amax(-1), scheme.bits)
    assert torch.equal(scale, torch.exp2(theirs.float() - 127))


@EVERY
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_extremes_stay_finite(scheme: Scheme, size: float, method: str) -> None:
    weight = sample(1).clamp_(-1, 1) * size
    q = round_to_nearest(weight, scheme, torch.bfloat16, method)
    assert isinstance(q, QuantizedWeight)
    assert bool((q.scale >= 2.0**-126).all()) and bool((q.scale <= 2.0**124).all())
    found = q.dequantize(torch.float32)
    assert bool(found.isfinite().all())
    if 1e-38 < size < 1e38:
        assert float((found / size - weight / size).norm() / (weight / size).norm()) < 0.2


@EVERY
def test_zero_groups_are_zero_and_infinities_are_refused(scheme: Scheme) -> None:
    weight = sample(2)
    weight[1, 32:64] = 0
    assert not bool(round_to_nearest(weight, scheme, torch.bfloat16).dequantize(torch.float32)[1, 32:64].any())
    for bad in (float("inf"), -float("inf"), float("nan")):
        weight[0, 0] = bad
        with pytest.raises(LlmqError, match="not finite"):
            round_to_nearest(weight, scheme, torch.bfloat16)
