"""Ranges: never worse than min-max, close to an exhaustive search, and finite whatever comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids import base
from llmq.grids.base import QuantizedWeight, round_to_grid
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme


def quantized(
    weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, method, importance, dtype)
    codes = round_to_grid(weight, scale, zero, scheme)
    assert scale.dtype == dtype and bool(torch.isfinite(scale).all()) and bool((scale != 0).all())
    assert (zero is None) == scheme.symmetric
    assert scheme.symmetric or bool((scale > 0).all())
    assert scheme.qmin <= int(codes.min()) and int(codes.max()) <= scheme.qmax
    return QuantizedWeight(codes, scale, zero, scheme)


def errors(weight: Tensor, q: QuantizedWeight, importance: Tensor | None = None) -> Tensor:
    """Σ importance·(w − ŵ)² of every group, float64 [out, groups]."""
    square = (weight.double() - q.dequantize(torch.float32).double()).square()
    if importance is not None:
        square *= importance.double()
    return square.view(len(weight), q.scale.shape[1], -1).sum(-1)


def exhaustive(weight: Tensor, importance: Tensor, scheme: Scheme) -> float:
    """The least error of one group over 4,000 scales of either sign and every zero point, in float64."""
    w, a = weight.double(), importance.double()
    scales = torch.linspace(0.02, 1.2, 2000, dtype=torch.float64) * float(w.abs().max()) * 2 / (2**scheme.bits - 1)
    scales = torch.cat([scales, -scales])[:, None]
    zeros = [0] if scheme.symmetric else range(scheme.qmin, scheme.qmax + 1)
    best = float("inf")
    for zero in zeros:
        levels = ((w / scales).round() + zero).clamp(scheme.qmin, scheme.qmax) - zero
        best = min(best, float(((w - levels * scales).square() * a).sum(1).min()))
    return best


def sample(seed: int, rows: int, width: int, tails: float = 0.0) -> tuple[Tensor, Tensor]:
    """A weight, with heavier tails the larger `tails`, and an importance that spans some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight = weight * (1 + tails * torch.randn(rows, width, generator=generator) ** 2) * 0.02
    return weight, torch.exp(2 * torch.randn(width, generator=generator))


schemes = st.builds(Scheme, st.integers(2, 8), st.sampled_from([4, 16, 32, None]), st.booleans())


@settings(max_examples=80, deadline=None)
@given(schemes, st.integers(0, 2**31), st.floats(0, 2), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_never_worse_than_minmax(scheme: Scheme, seed: int, tails: float, dtype: torch.dtype) -> None:
    weight, importance = sample(seed, 6, 64, tails)
    base = quantized(weight, scheme, "minmax", None, dtype)
    assert bool((errors(weight, quantized(weight, scheme, "mse", None, dtype)) <= errors(weight, base) * 1.00001).all())
    weighted = quantized(weight, scheme, "weighted", importance, dtype)
    assert bool((errors(weight, weighted, importance) <= errors(weight, base, importance) * 1.00001).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_an_exhaustive_search(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 16, symmetric)
    weight, importance = sample(bits, 6, 64, 0.5)
    found = errors(weight, quantized(weight, scheme, "weighted", importance, torch.float32), importance).flatten()
    groups = zip(weight.view(-1, 16), importance.view(1, 4, 16).expand(6, 4, 16).reshape(-1, 16), strict=True)
    least = torch.tensor([exhaustive(w, a, scheme) for w, a in groups], dtype=torch.float64)
    ratio = found / least
    assert float(ratio.mean()) < 1.1 and float(ratio.max()) < 2, ratio


def test_minmax_is_the_convention_of_compressed_tensors() -> None:
    weight = torch.tensor([[-1.0, 0.25, 0.5, 3.0]])
    scale, zero = find_range(weight, Scheme(4, None), "minmax", None, torch.float32)
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[3 * 2 / 15]]))
    scale, zero = find_range(weight, Scheme(4, None, False), "minmax", None, torch.float32)
    torch.testing.assert_close(scale, torch.tensor([[4 / 15]]))
    assert zero is not None and zero.tolist() == [[-4]]
    scale, zero = find_range(weight.abs(), Scheme(4, None, False), "minmax", None, torch.float32)
    assert zero is not None and zero.tolist() == [[-8]], "the range includes 0"


@pytest.mark.parametrize("method", ["minmax", "mse", "weighted"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 6e-8, 1.0, 6e4, 3e38])
def test_extreme_magnitudes(size: float, symmetric: bool, method: str) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = quantized(weight, Scheme(4, 8, symmetric), method, torch.rand(32) + 0.1, dtype)
        value = q.dequantize(torch.float32)
        assert bool(torch.isfinite(value).all())
        if torch.finfo(dtype).tiny * 20 < size < torch.finfo(dtype).max:
            assert float((weight.double() - value.double()).norm() / weight.double().norm()) < 0.15


@pytest.mark.parametrize("method", ["minmax", "mse", "weighted"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_stay_zero(symmetric: bool, method: str) -> None:
    weight, importance = sample(0, 3, 16)
    weight[1, 4:8] = 0
    q = quantized(weight, Scheme(3, 4, symmetric), method, importance)
    assert bool((q.dequantize(torch.float32)[1, 4:8] == 0).all()) and float(q.scale[1, 1]) == 1
    importance[:] = 0
    assert bool(torch.isfinite(quantized(weight, Scheme(3, 4, symmetric), method, importance).scale).all())


def test_half_precision_weights_are_searched_in_float32() -> None:
    weight, _ = sample(0, 4, 64)
    weight = (weight * 1e6).clamp(-6e4, 6e4).to(torch.float16)
    q = quantized(weight, Scheme(4, 16), "mse", None, torch.float16)
    base = quantized(weight, Scheme(4, 16), "minmax", None, torch.float16)
    assert float(errors(weight, q).sum()) < float(errors(weight, base).sum())


def test_one_column_and_long_rows() -> None:
    assert quantized(torch.tensor([[0.5], [-2.0]]), Scheme(4, None), "mse").codes.shape == (2, 1)
    weight, _ = sample(0, 2, 1 << 17)
    assert quantized(weight, Scheme(4, 128), "mse").codes.shape == weight.shape


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:

    weight, importance = sample(0, 40, 64)
    whole = quantized(weight, Scheme(3, 16), "weighted", importance)
    monkeypatch.setattr(base, "CHUNK", 128)
    parts = quantized(weight, Scheme(3, 16), "weighted", importance)
    assert torch.equal(whole.scale, parts.scale) and torch.equal(whole.codes, parts.codes)


def test_refusals() -> None:
    weight, importance = sample(0, 2, 24)
    with pytest.raises(LlmqError, match="group size 16 does not divide the 24 inputs"):
        find_range(weight, Scheme(4, 16))
    with pytest.raises(LlmqError, match="range must be one of"):
        find_range(weight, Scheme(4, 8), "best")
    with pytest.raises(LlmqError, match="needs the importance"):
        find_range(weight, Scheme(4, 8), "weighted")
    weight[1, 3] = float("nan")
    with pytest.raises(LlmqError, match="not finite"):
        find_range(weight, Scheme(4, 8), "weighted", importance)
