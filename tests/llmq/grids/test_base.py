"""What every grid promises, whichever it is: levels, codes, scales, ranks, against float64 and each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounded_on, rounding_of, storable
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

SCHEMES = [
    *(Scheme(bits, 32) for bits in range(2, 9)),
    Scheme(4, 32, False),
    Scheme(8, None, grid="fp8"),
    Scheme(8, 128, grid="fp8-block"),
    Scheme(4, 32, grid="nf4"),
    Scheme(4, 64, grid="nf4", double_quant=True),
    Scheme(4, 16, grid="nvfp4"),
    *(Scheme(bits, 32, grid=f"mxfp{bits}") for bits in (4, 6, 8)),
    Scheme(2, 32, grid="ternary"),
    Scheme(2, 32, grid="binary"),
    Scheme(4, 32, scales="pow2"),
    Scheme(4, 32, scales="float16"),
    Scheme(3, 32, False, scales="pow2"),
]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
CPU = torch.device("cpu")


def weight(seed: int = 0, rows: int = 6, width: int = 128) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@EVERY
def test_levels_are_what_codes_stand_for(scheme: Scheme) -> None:
    rounding = rounding_of(scheme.rules)
    levels = rounding.levels(scheme, CPU)
    assert levels.dtype == torch.float32 and bool((levels.diff() > 0).all()) and len(levels) <= 2**scheme.bits
    codes = rounding.encode(levels, scheme)
    assert codes.dtype == rounding.code_dtype and codes.element_size() == 1
    assert torch.equal(rounding.decode(codes, scheme).float(), levels)
    ranks = rounding.rank(levels, scheme)
    assert torch.equal(ranks.diff(), torch.ones(len(levels) - 1)) and torch.equal(
        rounding.of_rank(ranks, scheme), levels
    )
    assert rounding.ranks(scheme) == (int(ranks[0]), int(ranks[-1]))
    assert rounding.even == bool((levels.diff() == levels.diff()[0]).all())


@EVERY
def test_the_nearest_level_is_the_nearest_in_float64(scheme: Scheme) -> None:
    rounding = rounding_of(scheme.rules)
    levels = rounding.levels(scheme, CPU)
    scaled = torch.linspace(float(levels[0]) * 1.2, float(levels[-1]) * 1.2, 4001)
    got = rounding.nearest(scaled.clone(), None, scheme).double()
    least = (scaled.double().unsqueeze(-1) - levels.double()).abs().amin(-1)
    assert torch.isin(got.float(), levels).all()
    assert torch.allclose((got - scaled.double()).abs(), least, rtol=1e-6, atol=1e-9)


@EVERY
@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from(["minmax", "mse", "weighted"]))
def test_a_search_is_never_worse_than_min_max(scheme: Scheme, seed: int, method: str) -> None:
    w, importance = weight(seed), torch.rand(128, generator=torch.Generator().manual_seed(seed)) + 0.01

    def cost(how: str) -> Tensor:
        q = rounded_on(w, *rounding_of(scheme.rules).find_scale(w, scheme, how, importance, torch.bfloat16), scheme)
        by = importance if method == "weighted" else torch.ones(128)
        groups = scheme.groups(128)
        error = ((q.dequantize(torch.float64) - w.double()).square() * by.double()).view(6, groups, -1)
        error = error.sum(-1)
        return error if scheme.rules.rows == 1 else error.sum(0)  # all six channels are of one block

    # Double quantization moves scales a little after they were found.
    slack = 1.02 if scheme.double_quant else 1 + 1e-5
    assert bool((cost(method) <= cost("minmax") * slack + 1e-9).all())


@EVERY
def test_what_is_finished_is_reopened_as_it_was(scheme: Scheme) -> None:
    rounding, w = rounding_of(scheme.rules), weight(1)
    q = rounded_on(w, *rounding.find_scale(w, scheme, "mse", None, torch.bfloat16), scheme, ("a note",))
    stored = rounding.finish(q, torch.bfloat16)
    assert stored.notes == ("a note",) and stored.scheme == scheme
    assert torch.equal(stored.dequantize(torch.float32), q.dequantize(torch.float32))
    again = rounding.reopen(stored)
    assert torch.equal(again.codes.view(torch.uint8), q.codes.view(torch.uint8)) and torch.equal(again.scale, q.scale)


@EVERY
def test_scales_are_of_the_dtype_that_is_stored_and_zeros_stay_zero(scheme: Scheme) -> None:
    rounding, w = rounding_of(scheme.rules), weight(2)
    w[0] = 0
    scale, _ = rounding.find_scale(w, scheme, "mse", None, torch.float16)
    assert scale.dtype == (rounding.scale_dtype or torch.float16) and bool(torch.isfinite(scale).all())
    found = round_to_nearest(w, scheme, torch.float16).dequantize(torch.float32)
    # A doubly quantized magnitude of 0 is only nearly 0, but the level that it multiplies is. Without a level 0 it is
    # the smallest scale.
    none = 0.0 if 0 in rounding.levels(scheme, CPU) else torch.finfo(torch.float16).tiny
    assert bool((found[0].abs() <= none).all()) and float((found[1:] - w[1:]).norm() / w[1:].norm()) < 0.6


@EVERY
def test_steps_to_the_next_level(scheme: Scheme) -> None:
    """A value half-way to the next level is half a step away, on either side, whatever the spacing."""
    rounding = rounding_of(scheme.rules)
    levels = rounding.levels(scheme, CPU)
    inner, half = levels[1:-1], levels.diff() / 2
    for away, want in ((half[1:], 0.5), (-half[:-1], -0.5)):
        assert torch.allclose(rounding.in_steps(away, inner, scheme), torch.full_like(inner, want))


@EVERY
def test_values_that_are_not_finite_and_unknown_ranges_are_refused(scheme: Scheme) -> None:
    rounding, w = rounding_of(scheme.rules), weight(3)
    w[2, 5] = float("nan")
    with pytest.raises(LlmqError, match="not finite"):
        rounding.find_scale(w, scheme, "mse", None, torch.bfloat16)
    with pytest.raises(LlmqError, match="needs the importance"):
        rounding.find_scale(weight(3), scheme, "weighted", None, torch.bfloat16)
    with pytest.raises(LlmqError, match="range must be one of minmax, mse, weighted.*not 'best'"):
        rounding.find_scale(weight(3), scheme, "best", None, torch.bfloat16)


def test_a_weight_of_another_kind_is_not_reopened() -> None:
    nf4 = round_to_nearest(weight(), Scheme(4, 64, grid="nf4"), torch.bfloat16)
    with pytest.raises(LlmqError, match="is a QuantizedWeight, not a NF4Weight"):
        rounding_of(Scheme().rules).reopen(nf4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scales_are_normal_and_keep_their_sign(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scale = storable(torch.tensor([0.0, -1e-45, 1e38, -3.0]), dtype, torch.tensor(1.0))
    assert scale.tolist() == [info.tiny, -info.tiny, float(torch.tensor(min(1e38, info.max)).to(dtype)), -3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_back_rounds_once(dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale, zero = torch.rand(3, 2) + 0.1, torch.tensor([[1, -2], [0, 3], [-8, 7]], dtype=torch.int8)
    got = QuantizedWeight(codes, scale, zero, Scheme(4, 32, False)).dequantize(dtype)
    exact = ((codes.double().view(3, 2, 32) - zero.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)).flatten(1)
    assert got.dtype == dtype and torch.equal(got, exact.float().to(dtype))
