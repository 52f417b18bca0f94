"""Powers of two and sums of two of them: the levels of the papers by their formulas, and what rounding costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmq.errors import LlmqError
from llmq.grids.base import rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

CPU = torch.device("cpu")


def levels(scheme: Scheme) -> list[float]:
    found: list[float] = rounding_of(scheme.rules).levels(scheme, CPU).tolist()
    return found


@pytest.mark.parametrize("bits", [3, 4])
def test_the_logarithmic_levels_are_all_powers_that_a_code_can_hold(bits: int) -> None:
    found = levels(Scheme(bits, None, grid="log"))
    powers = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    assert found == sorted([0.0, *powers, *(-p for p in powers)]) and len(found) == 2**bits - 1


def test_additive_powers_are_those_of_the_paper() -> None:
    """Of 2n + 1 bits of magnitude, pᵢ ∈ {0, 2^−i, 2^−(i+n), 2^−(i+2n+1)} and p̃ ∈ {0, 2^−2n}; of 2n bits, in pᵢ
    2^−(i+2n) stands last."""
    sums = {sum(parts) for parts in itertools.product((0.0, 2.0**0, 2.0**-1, 2.0**-3), (0.0, 2.0**-2))}
    assert levels(Scheme(4, None, grid="apot")) == sorted({*sums, *(-s for s in sums)})
    assert len(sums) == 8
    assert levels(Scheme(3, None, grid="apot")) == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]


def test_additive_powers_fit_bell_shaped_weights_better_than_powers_alone() -> None:
    """The paper's claim (section 2.2): powers alone spend their levels near 0."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = {}
    for grid in ("log", "apot"):
        found = round_to_nearest(weight, Scheme(4, 64, grid=grid), torch.float32).dequantize(torch.float32)
        error[grid] = float((found - weight).norm() / weight.norm())
    assert error["apot"] < 0.8 * error["log"]


@pytest.mark.parametrize("grid", ["log", "apot"])
def test_other_bits_are_refused(grid: str) -> None:
    with pytest.raises(LlmqError, match=f"grid '{grid}' is 3 to 4 bits, symmetric"):
        Scheme(2, 64, grid=grid)
