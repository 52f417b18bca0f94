"""Candidates are judged by looked-up sums about as well as one by one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.grids.candidates import SIDED, best_candidate, scales_of
from llmq.grids.scheme import Scheme


def one_by_one(weight: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """The least error of each group [groups, size], over the same scales and every zero point, each with its
    least-squares scale, in float64."""
    w, a = weight.double(), importance.double().expand(weight.shape)
    least = torch.full((len(w),), torch.inf, dtype=torch.float64)
    top = w.abs().amax(1, keepdim=True) * 2 if scheme.symmetric else w.amax(1, keepdim=True) - w.amin(1, keepdim=True)
    signs = (1, -1) if scheme.symmetric else (1,)
    zeros = [0] if scheme.symmetric else range(scheme.qmin, scheme.qmax + 1)
    for fraction in scales_of(scheme.bits, 16):
        for sign in signs:
            for zero in zeros:
                scale = top * sign * fraction / (2**scheme.bits - 1)
                k = (w / scale).round().clamp(scheme.qmin - zero, scheme.qmax - zero)
                dot, size = (a * w * k).sum(1), (a * k * k).sum(1).clamp_min(1e-30)
                least = torch.minimum(least, (a * w * w).sum(1) - dot**2 / size)
    return least


def measured(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    w, s, z = weight.double(), scale.double(), zero.double()
    k = (w / s).round().clamp(scheme.qmin - z, scheme.qmax - z)
    return (importance.double() * (w - k * s) ** 2).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_as_good_as_one_by_one(bits: int, symmetric: bool) -> None:
    scheme, generator = Scheme(bits, 64, symmetric), torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 16, 64, generator=generator) / 8 + 0.02
    importance = torch.rand(1, 16, 64, generator=generator) + 0.1
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    for by in (None, importance):
        scale, zero = best_candidate(weight, low, high, scheme, by)
        given = torch.ones_like(importance) if by is None else by
        found = measured(weight, given, scale, zero, scheme).flatten()
        least = one_by_one(weight.flatten(0, 1), given.expand_as(weight).flatten(0, 1), scheme)
        assert float(found.sum() / least.sum()) < 1.01, "of all groups"
        assert float((found / least).max()) < 1.15, "of the worst"


@pytest.mark.parametrize("bits", range(SIDED, 9))
def test_the_side_of_the_largest_weight_has_the_extra_level(bits: int) -> None:
    scheme = Scheme(bits, 32)
    weight = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(bits)) / 8
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale, zero = best_candidate(weight, low, high, scheme, None)
    assert torch.equal(scale < 0, high > -low) and not bool(zero.any())
    every = measured(weight, torch.ones(1), torch.maximum(high, -low) * 2 / (2**bits - 1), zero, scheme)
    found = measured(weight, torch.ones(1), scale, zero, scheme)
    assert float(found.sum()) < float(every.sum())


@pytest.mark.parametrize("scheme", [Scheme(4, 8), Scheme(8, 8), Scheme(3, 8, False)])
def test_nothing_is_found_for_zeros(scheme: Scheme) -> None:
    weight, none = torch.zeros(1, 2, 8), torch.zeros(1, 2, 1)
    scale, _ = best_candidate(weight, none, none, scheme, torch.zeros(1, 2, 8))
    assert bool((scale == 0).all())
