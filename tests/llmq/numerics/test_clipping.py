"""AWQ's clipping: against brute force in float64 over the same factors, and never worse than where it starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.base import QuantizedWeight, round_to_grid
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.numerics.clipping import FACTORS, clip_groups

SCHEMES = [Scheme(4, 16), Scheme(3, 32, symmetric=False), Scheme(2, 16), Scheme(4, None), Scheme(8, 16)]


def problem(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight with a few outliers, and the moments of inputs whose channels go together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight *= torch.where(torch.rand(rows, width, generator=generator) < 0.03, 4.0, 1.0)
    mixed = torch.randn(width, width, generator=generator) * torch.linspace(0.2, 2, width)
    x = torch.randn(300, width, generator=generator) @ mixed
    return weight, x.t() @ x / 300


def costs(weight: Tensor, value: Tensor, moments: Tensor, groups: int) -> Tensor:
    """e H eᵀ of every group, float64 [rows, groups]."""
    size = weight.shape[1] // groups
    error = weight.double() - value.double()
    found = torch.empty(weight.shape[0], groups, dtype=torch.float64)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for r in range(weight.shape[0]):
            found[r, g] = error[r, part] @ moments.double()[part, part] @ error[r, part]
    return found


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Rounded with given scales: divided in float32, as codes are chosen, the rest in float64."""
    size = weight.shape[1] // scale.shape[1]
    wide = scale.float().repeat_interleave(size, 1)
    offset = torch.zeros(()) if zero is None else zero.float().repeat_interleave(size, 1)
    codes = ((weight / wide).round() + offset).clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    return (codes - offset).double() * wide.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_brute_force_finds_nothing_better(scheme: Scheme, dtype: torch.dtype) -> None:
    weight, moments = problem(12, 64, 0)
    scale, zero = find_range(weight, scheme, "minmax", None, dtype)
    before = scale.clone()
    found = clip_groups(weight, scale, zero, scheme, moments)
    assert torch.equal(scale, before) and found.scale.dtype == dtype
    assert (zero is None) == (found.zero is None) and (zero is None or torch.equal(found.zero, zero))  # type: ignore[arg-type]
    groups = scale.shape[1]
    reached = costs(weight, found.dequantize(torch.float32), moments, groups)
    tried = []
    for factor in (1.0, *FACTORS):
        moved = (scale.float() * factor).to(dtype)
        tried.append(costs(weight, on_grid(weight, moved, zero, scheme), moments, groups))
    least, start = torch.stack(tried).amin(0), tried[0]
    assert torch.allclose(reached, least, rtol=1e-4)
    assert bool((reached <= start * (1 + 1e-5)).all())
    if scheme.bits <= 4:
        assert float(reached.sum()) < 0.95 * float(start.sum())


@given(st.integers(0, 10**6), st.sampled_from(SCHEMES), st.sampled_from(["minmax", "mse"]))
@settings(max_examples=40, deadline=None)
def test_it_is_never_worse_than_its_start(seed: int, scheme: Scheme, method: str) -> None:
    weight, moments = problem(5, 32, seed)
    scale, zero = find_range(weight, scheme, method, None, torch.float16)
    start = QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)
    found = clip_groups(weight, scale, zero, scheme, moments)
    before = costs(weight, start.dequantize(torch.float32), moments, scale.shape[1])
    after = costs(weight, found.dequantize(torch.float32), moments, scale.shape[1])
    assert bool((after <= before * (1 + 1e-4) + 1e-9).all())


def test_groups_without_inputs_keep_their_scale() -> None:
    """Nothing tells factors apart where the moments are 0: the first, 1, stays."""
    weight, _ = problem(4, 32, 1)
    scheme = Scheme(4, 16)
    scale, zero = find_range(weight, scheme)
    found = clip_groups(weight, scale, zero, scheme, torch.zeros(32, 32))
    assert torch.equal(found.scale, scale)
