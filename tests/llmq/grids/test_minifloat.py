"""FP4 and FP6 against a list of their numbers in float64, made from the definition of the format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme
from tests.llmq.grids.peers import known_to_compressed_tensors

FOUR = [Scheme(4, 16, grid="nvfp4"), Scheme(4, 32, grid="mxfp4")]
SCHEMES = [*FOUR, Scheme(6, 32, grid="mxfp6")]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
CPU = torch.device("cpu")


def numbers(bits: int) -> Tensor:
    """The numbers of all codes: sign, two bits of exponent with a bias of 1, then mantissa; float64 [2^bits]."""
    mantissa, found = bits - 3, []
    for code in range(1 << bits):
        sign, exponent = -1.0 if code >> (bits - 1) else 1.0, (code >> mantissa) & 3
        fraction = (code & ((1 << mantissa) - 1)) / (1 << mantissa)
        found.append(sign * (fraction if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1)))
    return torch.tensor(found, dtype=torch.float64)


@EVERY
def test_codes_are_those_of_the_format(scheme: Scheme) -> None:
    rounding, want = rounding_of(scheme.rules), numbers(scheme.bits)
    codes = torch.arange(1 << scheme.bits, dtype=torch.uint8)
    assert torch.equal(rounding.decode(codes, scheme).double(), want)
    # The code of −0 is written as that of 0.
    again = torch.where(codes == 1 << (scheme.bits - 1), 0, codes)
    assert torch.equal(rounding.encode(want.float(), scheme), again)
    assert rounding.reach(scheme) == float(want.max()) == {4: 6.0, 6: 7.5}[scheme.bits]


@EVERY
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40))
def test_the_nearest_by_brute_force(scheme: Scheme, values: list[float]) -> None:
    want, given_ = numbers(scheme.bits), torch.tensor(values, dtype=torch.float32)
    got = rounding_of(scheme.rules).nearest(given_.clone(), None, scheme).double()
    least = (given_.double().clamp(want.min(), want.max()).unsqueeze(-1) - want).abs().amin(-1)
    assert bool(torch.isin(got, want).all())
    # All numbers here are exact: there is nothing to tolerate.
    assert torch.equal((got - given_.double().clamp(want.min(), want.max())).abs(), least)


@EVERY
def test_ties_go_to_the_even_code_as_in_compressed_tensors(scheme: Scheme) -> None:
    known_to_compressed_tensors(scheme)
    from compressed_tensors.quantization import quant_args

    levels = rounding_of(scheme.rules).levels(scheme, CPU)
    middle = (levels[1:] + levels[:-1]) / 2
    four = scheme.bits == 4
    cast = (quant_args.FP4_E2M1_DATA.cast_to_fp4 if four else quant_args.FP6_E2M3_DATA.cast_to_fp6)(middle.clone())
    assert torch.equal(rounding_of(scheme.rules).nearest(middle.clone(), None, scheme), cast)


@EVERY
def test_extremes_are_clipped(scheme: Scheme) -> None:
    top = rounding_of(scheme.rules).reach(scheme)
    given_ = torch.tensor([float("inf"), -float("inf"), 3e38, -1e-45, 0.0])
    assert rounding_of(scheme.rules).nearest(given_, None, scheme).tolist() == [top, -top, top, 0.0, 0.0]
