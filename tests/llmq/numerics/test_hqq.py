"""Half-quadratic splitting: its shrinkage against the papers', its result against an exhaustive search in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import eight_bit
from llmq.grids.base import QuantizedWeight, round_to_grid
from llmq.grids.nearest import round_to_nearest
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.methods import find
from llmq.numerics.hqq import _shrink, half_quadratic


def sample(seed: int, rows: int = 6, width: int = 64, tails: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight * (1 + tails * torch.randn(rows, width, generator=generator) ** 2) * 0.02


def rounded(weight: Tensor, scheme: Scheme, method: str, dtype: torch.dtype) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, method, None, dtype)
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)


def objective(weight: Tensor, q: QuantizedWeight, p: float) -> Tensor:
    """Σ|w − ŵ|^p of every group, float64 [out, groups]."""
    left = (weight.double() - q.dequantize(torch.float64)).abs() ** p
    return left.view(len(weight), q.scale.shape[1], -1).sum(-1)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(Scheme, st.integers(2, 8), st.sampled_from([8, 32, None]), st.booleans()),
    st.sampled_from([0.5, 0.7, 1.0, 2.0, 2.5]),
    st.integers(0, 2**31),
    st.floats(0, 2),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_never_worse_than_rounding_on_the_mse_range(
    scheme: Scheme, p: float, seed: int, tails: float, dtype: torch.dtype
) -> None:
    weight = sample(seed, tails=tails)
    q = half_quadratic(weight, scheme, dtype, p=p)
    assert q.codes.dtype == torch.int8 and q.scale.dtype == dtype and (q.zero is None) == scheme.symmetric
    assert scheme.qmin <= int(q.codes.min()) and int(q.codes.max()) <= scheme.qmax
    assert torch.equal(q.codes, round_to_grid(weight, q.scale, q.zero, scheme)), "the nearest codes of its own grid"
    base = objective(weight, rounded(weight, scheme, "mse", dtype), p)
    assert bool((objective(weight, q, p) <= base * 1.0001).all())


@pytest.mark.parametrize("p", [0.7, 2.0, 3.0])
@pytest.mark.parametrize("rows", [96, 200])
def test_a_block_of_channels_is_never_worse_either(p: float, rows: int) -> None:
    scheme = Scheme(8, 128, grid="fp8-block")
    weight = sample(rows, rows, 256, 2.0) * torch.exp(torch.randn(rows, 1, generator=torch.Generator().manual_seed(0)))
    q, base = (
        half_quadratic(weight, scheme, torch.bfloat16, p=p),
        round_to_nearest(weight, scheme, torch.bfloat16, "mse"),
    )
    assert isinstance(base, QuantizedWeight)
    stored = eight_bit.pack(q)["weight_scale"]
    assert stored.shape == (-(-rows // 128), 2)

    def of_blocks(found: QuantizedWeight) -> Tensor:
        error = objective(weight, found, p)
        return torch.stack([band.sum(0) for band in error.split(128)])

    mine, other = of_blocks(q), of_blocks(base)
    assert bool((mine <= other * 1.0001).all()) and (p > 1 or bool((mine < other).any()))


@pytest.mark.parametrize("p", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_between_the_mse_range_and_an_exhaustive_search(bits: int, symmetric: bool, p: float) -> None:
    scheme = Scheme(bits, 32, symmetric)
    weight = sample(bits, rows=24)
    found = objective(weight, half_quadratic(weight, scheme, torch.float32, p=p), p).flatten()
    start = objective(weight, rounded(weight, scheme, "mse", torch.float32), p).flatten()
    scales = np.linspace(0.02, 1.2, 800)
    signs = [1, -1] if symmetric else [1]
    zeros = [0] if symmetric else range(scheme.qmin, scheme.qmax + 1)
    least = []
    for group in weight.double().view(-1, 32).numpy():
        scale = np.concatenate([sign * scales for sign in signs])[:, None] * np.abs(group).max() * 2 / (2**bits - 1)
        every = [(np.clip(np.round(group / scale) + z, scheme.qmin, scheme.qmax) - z) * scale for z in zeros]
        least.append(min((np.abs(group - value) ** p).sum(1).min() for value in every))
    reached = (start.mean() - found.mean()) / (start.mean() - np.mean(least))
    assert reached > 0.3, f"{float(reached):.2f} of what there is to gain"


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_the_shrinkage_is_the_papers(p: float) -> None:
    x = np.linspace(-2, 2, 41)
    want = np.sign(x) * np.maximum(np.abs(x) - np.maximum(np.abs(x), 1e-6) ** (p - 1) / 3, 0)
    np.testing.assert_allclose(_shrink(torch.from_numpy(x), p, 3).numpy(), want, atol=1e-12)


def test_an_outlier_is_let_go_the_sooner_the_smaller_p() -> None:
    weight = sample(0, rows=1, width=64, tails=0)
    weight[0, 7] = 0.3
    scheme = Scheme(4, None)
    small, large = (abs(float(half_quadratic(weight, scheme, torch.float32, p=p).scale)) for p in (0.7, 3.0))
    assert small < 0.6 * large


def test_unbiased_keeps_the_length_along_the_weight() -> None:
    weight = sample(0, rows=16)
    for share, low, high in ((0.0, -0.2, -0.02), (1.0, -1e-5, 1e-5)):
        value = half_quadratic(weight, Scheme(2, 16), torch.float32, p=2, unbiased=share).dequantize(torch.float64)
        groups, w = value.view(-1, 16), weight.double().view(-1, 16)
        along = (groups * w).sum(-1) / (w * w).sum(-1) - 1
        assert low < float(along.mean()) < high


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 3e38])
def test_hostile_groups(size: float, symmetric: bool) -> None:
    weight = sample(0, rows=5)
    weight = weight / weight.abs().max()
    weight[0] = 0
    weight[1] = -0.5
    weight[2] = 0
    weight[2, 3] = 1
    for dtype in (torch.bfloat16, torch.float32):
        value = (weight * size).to(dtype)
        q = half_quadratic(value, Scheme(3, 16, symmetric), dtype, unbiased=0.5)
        assert bool(torch.isfinite(q.scale).all()) and bool((q.scale != 0).all())
        assert bool((q.dequantize(torch.float32)[0] == 0).all())
        assert bool(torch.isfinite(q.dequantize(torch.float64)).all())


def test_refusals_and_the_method() -> None:
    weight = sample(0)
    for wrong in ({"p": 0.0}, {"beta": -1.0}, {"kappa": 0.9}, {"iterations": 0}, {"unbiased": 2.0}):
        with pytest.raises(LlmqError, match="half-quadratic"):
            half_quadratic(weight, Scheme(4, 16), torch.float32, **wrong)
    method = find("hqq")()
    assert method.quantize_needs == ()
    q = method.quantize(weight, Scheme(4, 16), {}, torch.float16)
    assert q.scale.dtype == torch.float16 and q.codes.shape == weight.shape
