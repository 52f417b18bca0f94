"""Ternary weights: the optimum against every scale that can be stored, the closed form against its paper."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import packed
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

TERNARY = Scheme(2, 8, grid="ternary")


def sample(seed: int, rows: int = 8, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))


def errors(weight: Tensor, scale: Tensor, by: Tensor) -> Tensor:
    """Σ a(w − ŵ)² of groups [out, groups, size] rounded to the nearest of −s, 0, s, for scales [out, groups, n]."""
    size = weight.double().abs().unsqueeze(-2)
    wide = scale.double().unsqueeze(-1)
    return (torch.minimum(size.square(), (size - wide).square()) * by.double().unsqueeze(-2)).sum(-1)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["mse", "weighted"]))
def test_no_scale_that_can_be_stored_is_better(seed: int, method: str) -> None:
    weight = sample(seed)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) ** 3
    by = (importance if method == "weighted" else torch.ones(32)).view(1, 4, 8)
    found, zero = rounding_of(TERNARY.rules).find_scale(weight, TERNARY, method, importance, torch.bfloat16)
    # Every bfloat16 from 2^-12 to 2^12: no group's best scale is smaller than a magnitude in it, or larger.
    every = torch.arange((127 - 12) << 7, (127 + 12) << 7, dtype=torch.int16).view(torch.bfloat16)
    least = errors(weight.view(8, 4, 8), every.expand(8, 4, -1), by).amin(-1)
    got = errors(weight.view(8, 4, 8), found.unsqueeze(-1), by)[..., 0]
    assert zero is None and found.dtype == torch.bfloat16
    torch.testing.assert_close(got, least, rtol=1e-5, atol=1e-9)


def test_minmax_is_the_closed_form_of_the_paper() -> None:
    weight = sample(1)
    found, _ = rounding_of(TERNARY.rules).find_scale(weight, TERNARY, "minmax", None, torch.float32)
    for group, scale in zip(weight.double().view(-1, 8), found.flatten().double(), strict=True):
        above = [abs(w) for w in group.tolist() if abs(w) > 0.7 * group.abs().mean()]
        assert abs(float(scale) - sum(above) / len(above)) < 1e-6 * float(scale)


def test_the_bytes_are_those_of_compressed_tensors_for_two_bits() -> None:
    q = round_to_nearest(sample(2), TERNARY, torch.bfloat16)
    assert isinstance(q, QuantizedWeight) and q.codes.unique().tolist() == [-1, 0, 1]
    tensors = packed.pack(q)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(q.codes, 2))
    assert torch.equal(packed.unpack(tensors, TERNARY).dequantize(torch.float32), q.dequantize(torch.float32))


@pytest.mark.parametrize("grid", ["ternary", "binary"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e30, 3e38])
def test_any_magnitude(grid: str, size: float) -> None:
    scheme = Scheme(2, 8, grid=grid)
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], [0.0] * 8]) * size
    for method in ("minmax", "mse", "weighted"):
        q = round_to_nearest(weight, scheme, torch.bfloat16, method, torch.ones(8))
        # Below the smallest normal number nothing is kept but that it is small.
        off = (q.dequantize(torch.float32).double() - weight.double()).abs()
        assert bool((off <= 2**-8 * weight.double().abs() + 1.2e-38).all())


@pytest.mark.parametrize("grid", ["ternary", "binary"])
def test_what_is_infinite_is_refused_and_inputs_that_do_not_count_are_nothing(grid: str) -> None:
    scheme, weight = Scheme(2, 8, grid=grid), sample(3)
    importance = torch.zeros(32)
    importance[:8], importance[8] = 1, 1
    weight[:, 8] = 0  # of the second group only a 0 counts, of the third and fourth nothing
    q = round_to_nearest(weight, scheme, torch.bfloat16, "weighted", importance)
    assert isinstance(q, QuantizedWeight) and bool((torch.isfinite(q.scale) & (q.scale > 0)).all())
    weight[0, 0] = torch.inf
    with pytest.raises(LlmqError, match="not finite"):
        round_to_nearest(weight, scheme, torch.bfloat16)
