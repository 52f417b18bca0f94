"""K-quants: what is stored is exact, the search is never worse than min-max, and solvers may be handed any scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounded_on, rounding_of
from llmq.grids.kquants import MULTIPLES, KWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.grids.table import K_QUANTS
from llmq.methods.distill import Distill
from llmq.methods.hqq import HQQ
from llmq.numerics.learned_rounding import LearnedWeight
from llmq.numerics.straight_through import TrainedWeight

SCHEMES = [changed_scheme({"grid": f"q{bits}_k"}, Scheme(), "") for bits, _, _ in K_QUANTS]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
BITS = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625}


def weight(seed: int = 0, rows: int = 4, width: int = 512) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def rounded(value: Tensor, scheme: Scheme, method: str = "mse", importance: Tensor | None = None) -> KWeight:
    found = round_to_nearest(value, scheme, torch.bfloat16, method, importance)
    assert isinstance(found, KWeight)
    return found


def by_formula(stored: KWeight) -> Tensor:
    """d · s · q − e · m, value by value, float64."""
    levels, (rows, width) = stored.levels, stored.codes.shape
    size = width // levels.whole.shape[1]
    found = torch.empty(rows, width, dtype=torch.float64)
    for row in range(rows):
        for column in range(width):
            group, block = column // size, column // 256
            found[row, column] = levels.d[row, block].double() * levels.whole[row, group] * stored.codes[row, column]
            if levels.lowest is not None and levels.e is not None:
                found[row, column] -= levels.e[row, block].double() * levels.lowest[row, group]
    return found


@EVERY
def test_a_name_says_all(scheme: Scheme) -> None:
    assert scheme.symmetric == (scheme.bits in (3, 6)) and scheme.group_size == (32 if scheme.bits in (4, 5) else 16)
    assert str(scheme) == f"q{scheme.bits}_k g{scheme.group_size}" and not scheme.rules.zero_points
    assert changed_scheme({"grid": "int"}, scheme, "").symmetric
    with pytest.raises(LlmqError, match=f"grid 'q{scheme.bits}_k' is {scheme.bits} bits, .*symmetric, in blocks"):
        changed_scheme({"symmetric": not scheme.symmetric}, scheme, "")
    assert HQQ().refusal(scheme) is not None
    assert "cannot move" in str(Distill().refusal(scheme))


@EVERY
def test_what_is_stored_is_exact_and_within_its_bits(scheme: Scheme) -> None:
    found = rounded(weight(rows=2), scheme)
    assert torch.equal(found.dequantize(torch.float32), by_formula(found).to(torch.float32))
    lowest, highest = MULTIPLES[scheme.bits]
    levels = found.levels
    assert levels.d.dtype == torch.float16 and levels.whole.dtype == torch.int8 and bool((levels.whole != 0).all())
    assert lowest <= int(levels.whole.min()) and int(levels.whole.max()) <= highest
    ends = rounding_of(scheme.rules).ranks(scheme)
    assert ends[0] <= int(found.codes.min()) and int(found.codes.max()) <= ends[1]
    if levels.lowest is not None:
        assert int(levels.lowest.min()) >= 0 and int(levels.lowest.max()) <= highest
    # Every weight has the point that is nearest among those of its group.
    opened = rounding_of(scheme.rules).reopen(found)
    again = rounded_on(weight(rows=2), opened.scale, opened.zero, scheme)
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scale, opened.scale)


@EVERY
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["mse", "weighted"]))
def test_a_search_is_never_worse_than_min_max(scheme: Scheme, seed: int, method: str) -> None:
    w, importance = weight(seed), torch.rand(512, generator=torch.Generator().manual_seed(seed)) + 0.01

    def cost(how: str) -> Tensor:
        away = (rounded(w, scheme, how, importance).dequantize(torch.float32).double() - w.double()).square()
        return (away * (importance.double() if method == "weighted" else 1.0)).view(4, 2, 256).sum(-1)

    assert bool((cost(method) <= cost("minmax") * (1 + 1e-5)).all())
    assert float(cost(method).sum()) < 0.95 * float(cost("minmax").sum())


@EVERY
def test_two_levels_cost_little_beside_a_scale_for_each_group(scheme: Scheme) -> None:
    w = weight(5, 8)
    alone = Scheme(scheme.bits, scheme.group_size, scheme.symmetric)
    free = round_to_nearest(w, alone, torch.float32, "mse").dequantize(torch.float32)
    error = (rounded(w, scheme).dequantize(torch.float32) - w).norm()
    # Multiples of 4 bits are coarse; a minimum that is no whole number of steps makes up for some of it.
    assert float(error / (free - w).norm()) < (1.1 if scheme.bits == 2 else 1.07)


@EVERY
def test_zeros_stay_zero_and_magnitudes_do_not_matter(scheme: Scheme) -> None:
    w = weight(2)
    w[0], w[1, 256:] = 0, 0
    w[2] *= 1e-3
    w[3, :32] *= 300
    error = (rounded(w, scheme).dequantize(torch.float32) - w).view(4, 2, 256).norm(dim=-1)
    assert float(error[0].sum()) == 0 and float(error[1, 1]) == 0
    assert bool((error <= 0.35 * w.view(4, 2, 256).norm(dim=-1)).all())
    levels = rounded(torch.full((1, 256), 1e-9), scheme).levels
    assert bool(torch.isfinite(levels.scale()).all()) and float(levels.d.abs().min()) > 0


@EVERY
def test_any_scales_settle_on_near_multiples(scheme: Scheme) -> None:
    rounding, generator = rounding_of(scheme.rules), torch.Generator().manual_seed(0)
    scale = torch.rand(3, scheme.groups(512), generator=generator) + 0.5
    zero = None if scheme.symmetric else torch.rand(scale.shape, generator=generator) * 3
    settled, moved, stored = rounding.settle(scale, zero, scheme)
    limit = max(map(abs, MULTIPLES[scheme.bits]))
    assert float((settled - scale).abs().max()) <= 1.5 / limit and torch.equal(stored.scale(), settled)
    again, back, same = rounding.settle(settled, moved, scheme)
    assert torch.equal(again, settled) and torch.equal(same.whole, stored.whole)
    if zero is not None and moved is not None and back is not None:
        assert float((moved * settled - zero * scale).abs().max()) <= 4.5 / limit
        assert torch.equal(same.minimum(), stored.minimum()) and torch.equal(back, moved)


@pytest.mark.parametrize("kind", [LearnedWeight, TrainedWeight])
@pytest.mark.parametrize("scheme", SCHEMES[1:3], ids=str)
def test_codes_are_learned_between_scales_that_stay(kind: type[LearnedWeight | TrainedWeight], scheme: Scheme) -> None:
    w, rounding = weight(7, 2, 256), rounding_of(scheme.rules)
    start = rounded(w, scheme)
    learned, value = kind(rounding.reopen(start), w), torch.empty(2, 256)
    learned.value(value)
    assert torch.allclose(value, start.dequantize(torch.float32), atol=1e-7)
    learned.step(torch.randn(2, 256, generator=torch.Generator().manual_seed(1)), 1.0, 0.1)
    found = rounding.finish(learned.quantized(), torch.bfloat16)
    assert found.levels is start.levels and not torch.equal(found.codes, start.codes)
    learned.value(value)
    assert torch.allclose(value, found.dequantize(torch.float32), atol=1e-7)


def test_points_are_added_to_zero_points_before_they_are_rounded() -> None:
    scheme = SCHEMES[2]
    rounding = rounding_of(scheme.rules)
    assert rounding.nearest(torch.tensor([1.3, -9.0, 40.0]), torch.tensor(0.4), scheme).tolist() == [2, 0, 15]
    assert rounding.levels(scheme, torch.device("cpu")).tolist() == [*range(16)]


def test_what_cannot_be_is_refused() -> None:
    scheme = SCHEMES[0]
    rounding = rounding_of(scheme.rules)
    with pytest.raises(LlmqError, match="scales of 256 inputs, which do not divide the 384"):
        rounding.find_scale(weight(width=384), scheme, "mse", None, torch.bfloat16)
    with pytest.raises(LlmqError, match="needs the importance"):
        rounding.find_scale(weight(), scheme, "weighted", None, torch.bfloat16)
    bad = weight()
    bad[1, 1] = torch.inf
    with pytest.raises(LlmqError, match="not finite"):
        rounding.find_scale(bad, scheme, "mse", None, torch.bfloat16)
    plain = QuantizedWeight(torch.zeros(1, 256, dtype=torch.int8), torch.ones(1, 16), torch.zeros(1, 16), scheme)
    with pytest.raises(LlmqError, match="needs the two levels of its scales"):
        rounding.finish(plain, torch.bfloat16)
    assert rounding.reopen(plain) is plain and rounding.units(plain) is None


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_whole_numbers_of_blocks_have_float16_scales_in_any_model(bits: int) -> None:
    scheme = changed_scheme({"grid": f"q{bits}_0"}, Scheme(), "")
    found = round_to_nearest(weight(width=64) * 1.7, scheme, torch.bfloat16)
    assert isinstance(found, QuantizedWeight) and found.scale.dtype == torch.float32 and found.zero is None
    assert torch.equal(found.scale.to(torch.float16).float(), found.scale)
    assert bool((found.scale.to(torch.bfloat16).float() != found.scale).any())
