"""Factors on scales: their gradient against autograd in float64, and what they leave as it was."""

from __future__ import annotations

import pytest
import torch

from llmq.formats.compressed_tensors import eight_bit
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics import scale_factors
from llmq.numerics.scale_factors import factor_gradient, scaled_by

SCHEMES = [Scheme(2, 8), Scheme(3, 16, False), Scheme(8, None), Scheme(8, None, grid="fp8"), Scheme(4, 32, grid="nf4")]


def weight(scheme: Scheme) -> QuantizedWeight:
    value = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return rounding_of(scheme.rules).reopen(round_to_nearest(value, scheme, torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_gradient_is_autograds(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_factors, "READ", 64)  # two rows at a time
    q = weight(scheme)
    rows, groups = q.scale.shape
    factor = torch.ones(rows, groups, dtype=torch.float64, requires_grad=True)
    points = rounding_of(scheme.rules).decode(q.codes, scheme).double().view(rows, groups, -1)
    zero = 0 if q.zero is None else q.zero.double().unsqueeze(-1)
    value = ((points - zero) * (q.scale.double() * factor).unsqueeze(-1)).flatten(1)
    assert torch.allclose(value.detach(), q.dequantize(torch.float32).double(), rtol=1e-6)
    outer = torch.randn(rows, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (value * outer).sum().backward()
    found = factor_gradient(q, outer)
    assert found.dtype == torch.float64 and torch.allclose(found, factor.grad, rtol=1e-12)
    low = factor_gradient(q, outer.to(torch.bfloat16))
    assert low.dtype == torch.float32 and torch.allclose(low.double(), factor.grad, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_moved_in_their_own_dtype(scheme: Scheme) -> None:
    q = weight(scheme)
    q.scale[0, 0] = 0
    factor = torch.full(q.scale.shape, 1.0)
    factor[1], factor[2], factor[3] = 1.25, 1e-9, 1e9
    moved = scaled_by(q, factor)
    assert moved.scale.dtype == q.scale.dtype and moved.codes is q.codes
    assert torch.equal(moved.scale[[0, 4, 5]], q.scale[[0, 4, 5]])
    wanted = (q.scale[1:4].float() * torch.tensor([[1.25], [0.1], [10.0]])).to(q.scale.dtype)
    assert torch.equal(moved.scale[1:4], wanted)


def test_channels_that_share_a_scale_share_its_factor() -> None:
    """The gradient is that of one factor for a block; what descent makes of it can be stored."""
    scheme = Scheme(8, 128, grid="fp8-block")
    value = torch.randn(160, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    q = rounding_of(scheme.rules).reopen(round_to_nearest(value, scheme, torch.bfloat16))
    outer = torch.randn(160, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shared = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    factors = shared.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
    (q.dequantize(torch.float32).double() * factors * outer).sum().backward()
    found = factor_gradient(q, outer)
    assert shared.grad is not None and torch.allclose(found[[0, 128]], shared.grad, rtol=1e-6)
    assert torch.equal(found[:128], found[:1].expand(128, 2)) and torch.equal(found[128:], found[128:129].expand(32, 2))
    factor = torch.ones(160, 2, requires_grad=True)
    step = torch.optim.Adam([factor], lr=0.05)
    for seed in range(3):
        outer = torch.randn(160, 256, generator=torch.Generator().manual_seed(seed))
        factor.grad = factor_gradient(scaled_by(q, factor.detach()), outer)
        step.step()
    moved = scaled_by(q, factor.detach())
    tensors = eight_bit.pack(moved)
    assert not torch.equal(tensors["weight_scale"], q.scale[::128])
    assert torch.equal(eight_bit.unpack(tensors, scheme).dequantize(torch.float32), moved.dequantize(torch.float32))
