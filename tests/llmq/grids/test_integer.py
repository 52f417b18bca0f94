"""Whole numbers: rounding by numpy in float64, zero points added after it, and codes that are their own points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmq.grids.integer import Integer
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from tests.llmq.refusal import refused

BITS = pytest.mark.parametrize("bits", range(2, 9))
INTEGER = Integer()


@BITS
def test_the_levels_are_all_numbers_of_so_many_bits_in_twos_complement(bits: int) -> None:
    levels = INTEGER.levels(Scheme(bits, 32), torch.device("cpu"))
    assert levels.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) and levels.dtype == torch.float32
    assert INTEGER.ranks(Scheme(bits, 32)) == (levels[0], levels[-1]) and INTEGER.even


@BITS
@pytest.mark.parametrize("zero", [None, -2, 1])
def test_the_nearest_is_rounded_before_the_zero_point_is_added(bits: int, zero: int | None) -> None:
    """Halves go to the even number on both sides of 0, and what lies beyond the ends is clipped."""
    scaled = np.concatenate([np.arange(-140, 140, 0.5), np.linspace(-3, 3, 601)])
    want = np.clip(np.round(scaled) + (zero or 0), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    held = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    found = INTEGER.nearest(torch.tensor(scaled, dtype=torch.float32), held, Scheme(bits, 32, zero is None))
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), want)


@BITS
def test_a_code_a_point_and_a_rank_are_the_same_number(bits: int) -> None:
    scheme = Scheme(bits, 32)
    points = INTEGER.levels(scheme, torch.device("cpu"))
    codes = INTEGER.encode(points, scheme)
    assert codes.dtype == torch.int8 == INTEGER.code_dtype and codes.tolist() == points.tolist()
    assert INTEGER.decode(codes, scheme).tolist() == points.tolist()
    assert torch.equal(INTEGER.of_rank(INTEGER.rank(points, scheme), scheme), points)
    assert INTEGER.rank(points, scheme).tolist() == points.tolist()
    away = torch.full_like(points, 0.25)
    assert torch.equal(INTEGER.in_steps(away, points, scheme), away)


@BITS
def test_it_reaches_half_the_span_of_its_codes(bits: int) -> None:
    scheme = Scheme(bits, None)
    reach = INTEGER.reach(scheme)
    assert reach == (2**bits - 1) / 2
    # So the largest magnitude of a weight, over it, is min-max's scale.
    weight = torch.tensor([[0.5, -3.0, 1.0]])
    scale, zero = INTEGER.find_scale(weight, scheme, "minmax", None, torch.float32)
    assert float(scale) == pytest.approx(3 / reach) and zero is None


def test_inputs_are_rounded_to_whole_numbers_half_to_even_in_their_own_dtype() -> None:
    x = torch.tensor([-2.5, -1.5, -0.4, 0.5, 1.5, 125.5], dtype=torch.bfloat16)
    found = INTEGER.round_input(x.clone())
    assert found.tolist() == [-2, -2, 0, 0, 2, 126] and found.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["minmax", "mse", "weighted", "percentile", "kl", "aciq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_the_search_that_is_named(method: str, symmetric: bool) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    importance, scheme = torch.linspace(0.1, 9, 64), Scheme(4, 32, symmetric)
    scale, zero = INTEGER.find_scale(weight, scheme, method, importance, torch.bfloat16)
    want, wanted_zero = find_range(weight, scheme, method, importance, torch.bfloat16)
    assert torch.equal(scale, want) and scale.dtype == torch.bfloat16
    assert (zero is None) is symmetric
    assert zero is None or (wanted_zero is not None and torch.equal(zero, wanted_zero))


def test_what_no_search_takes_is_refused() -> None:
    weight = torch.ones(2, 48)
    refused(lambda: INTEGER.find_scale(weight, Scheme(4, 32), "mse", None, torch.float32), "does not divide the 48")
    refused(lambda: INTEGER.find_scale(weight, Scheme(4, 16), "best", None, torch.float32), "not 'best'")
