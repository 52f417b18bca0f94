"""float8 weights, against a list of all 256 codes in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids import float8
from llmq.grids.float8 import find_float8_scale, round_to_float8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grid() -> Tensor:
    """Every finite value of e4m3, by its definition: float64 [253], ascending."""
    magnitudes = [m / 8 * 2.0**-6 for m in range(8)] + [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    return torch.tensor(sorted({sign * m for m in magnitudes for sign in (-1.0, 1.0)}), dtype=torch.float64)


def sample(seed: int, rows: int = 12, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))


def errors(weight: Tensor, scale: Tensor) -> Tensor:
    """Σ (w − ŵ)² of every row, float64."""
    read = round_to_float8(weight, scale).double() * scale.double()
    return (read - weight.double()).square().sum(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(("minmax", "mse")), st.sampled_from(DTYPES))
def test_the_nearest_code(seed: int, method: str, dtype: torch.dtype) -> None:
    weight = sample(seed)
    scale = find_float8_scale(weight, method, dtype)
    assert scale.shape == (12, 1) and scale.dtype == dtype and bool((scale > 0).all())
    codes = round_to_float8(weight, scale)
    assert codes.dtype == torch.float8_e4m3fn
    wanted = (weight.double() / scale.double()).clamp(-448, 448).unsqueeze(-1)
    least = (wanted - grid()).abs().amin(-1)
    # The quotient is rounded to float32 before the code is chosen: half-way cases may differ by that much.
    off = (codes.double().unsqueeze(-1) - wanted).abs().squeeze(-1) - least
    assert float((off / wanted.squeeze(-1).abs().clamp_min(1)).max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_is_never_worse_and_finds_the_best_of_its_steps(dtype: torch.dtype) -> None:
    weight = sample(3, 40, 64)
    base, found = (find_float8_scale(weight, method, dtype) for method in ("minmax", "mse"))
    before, after = errors(weight, base), errors(weight, found)
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < float(before.sum())
    most = weight.abs().amax(1, keepdim=True)
    tried = [errors(weight, (most * (factor / 448)).to(dtype)) for factor in (1.0, *float8.STEPS)]
    torch.testing.assert_close(after, torch.stack(tried).amin(0), rtol=1e-5, atol=0)


def test_minmax_puts_the_largest_at_448() -> None:
    scale = find_float8_scale(torch.tensor([[1.0, -896.0], [0.0, 0.0], [448.0, 3.0]]), "minmax", torch.float32)
    assert scale.tolist() == [[2.0], [1.0], [1.0]]


@pytest.mark.parametrize("method", ("minmax", "mse"))
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(method: str, size: float, dtype: torch.dtype) -> None:
    weight = sample(1).clamp_(-1, 1) * size
    scale = find_float8_scale(weight, method, dtype)
    assert bool(torch.isfinite(scale.float()).all()) and bool((scale.float() > 0).all())
    assert bool(torch.isfinite(round_to_float8(weight, scale).float()).all())


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample(5, 33, 48)
    scale = find_float8_scale(weight, "mse")
    codes = round_to_float8(weight, scale)
    monkeypatch.setattr(float8, "CHUNK", 100)
    assert torch.equal(find_float8_scale(weight, "mse"), scale)
    assert torch.equal(round_to_float8(weight, scale).view(torch.uint8), codes.view(torch.uint8))


def test_refusals() -> None:
    with pytest.raises(LlmqError, match="needs the importance"):
        find_float8_scale(torch.ones(2, 2), "weighted")
    with pytest.raises(LlmqError, match="minmax, mse, weighted, not 'best'"):
        find_float8_scale(torch.ones(2, 2), "best")
    with pytest.raises(LlmqError, match="not finite"):
        find_float8_scale(torch.tensor([[1.0, float("nan")]]))
