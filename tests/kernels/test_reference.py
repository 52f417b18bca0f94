"""The reference operators against arithmetic that can be done in the head."""

from __future__ import annotations

import pytest
import torch

from llmq_kernels.int8_linear.reference import int8_linear, round_input
from llmq_kernels.int_linear.reference import dequantize, int_linear, unpack_codes
from tests.kernels.weights import tolerance


def test_unpack_reads_the_lowest_bits_first() -> None:
    # 3 bits: stored 0, 1, 2 … 7, 0, 1, 2: element 10 straddles the first two words.
    stored = [k % 8 for k in range(11)]
    stream = sum(value << (3 * k) for k, value in enumerate(stored))
    words = torch.tensor([[stream & 0xFFFFFFFF, stream >> 32]], dtype=torch.int64).to(torch.int32)
    assert unpack_codes(words, 3, 11).tolist() == [[value - 4 for value in stored]]


@pytest.mark.parametrize(("dtype", "width", "n"), [(torch.int64, 1, 8), (torch.int32, 2, 8), (torch.int32, 1, 9)])
def test_unpack_refuses_what_does_not_fit(dtype: torch.dtype, width: int, n: int) -> None:
    with pytest.raises(ValueError, match="codes of 4 bits need int32"):
        unpack_codes(torch.zeros(3, width, dtype=dtype), 4, n)


def test_dequantize_subtracts_the_zero_point_and_scales_each_group() -> None:
    codes = torch.tensor([[-2, 1, 0, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16)
    assert dequantize(codes, scale).tolist() == [[-1.0, 0.5, 0.0, -2.0]]
    assert dequantize(codes, scale, torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[-1.5, 0.0, -2.0, -4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_product_with_the_dequantized_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 16, (5, 16), generator=generator)
    words = torch.stack(
        [(stored[:, :8] << torch.arange(0, 32, 4)).sum(1), (stored[:, 8:] << torch.arange(0, 32, 4)).sum(1)]
    )
    words = words.t().to(torch.int32).contiguous()
    scale = torch.rand(5, 2, generator=generator) + 0.1
    x = torch.randn(2, 3, 16, generator=generator).to(dtype)
    weight = ((stored - 8).view(5, 2, 8) * scale.unsqueeze(-1)).view(5, 16)
    got = int_linear(x, words, scale, None, None, 4, 8)
    assert got.dtype == dtype and got.shape == (2, 3, 5)
    exact = x.double() @ weight.double().t()
    allowed = tolerance(x.view(6, 16), weight.double()).view(2, 3, 5)
    assert ((got.double() - exact).abs() <= allowed).all()


def shifted(sums: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """sums / 2^by, rounded to nearest, ties to even, in integers alone: int64, by ≥ 1."""
    return (sums + (1 << (by - 1)) - 1 + ((sums >> by) & 1)) >> by


def test_with_powers_of_two_as_scales_requantization_is_a_shift() -> None:
    """Two W8A8 layers in integers alone are bit for bit those of the operator: inputs 2^-4, weights 2^-9 to 2^-6."""
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-128, 128, shape, generator=g).to(torch.int8) for shape in ((48, 512), (16, 48)))
    a, c = -4, 1
    b = torch.randint(-9, -5, (48, 1), generator=g)
    d = torch.randint(-9, -5, (16, 1), generator=g)
    levels = torch.randint(-128, 128, (5, 512), generator=g)
    x = levels * 2.0**a
    hidden = int8_linear(x, first, torch.exp2(b.float()), torch.tensor([2.0**a]))
    sums = levels @ first.long().t()
    assert torch.equal(hidden, torch.ldexp(sums.float(), a + b.view(-1)))
    middle = shifted(sums, c - a - b.view(-1)).clamp(-128, 127)
    assert torch.equal(round_input(hidden, torch.tensor([2.0**c]))[0].long(), middle)
    assert (int(middle.min()), int(middle.max())) == (-128, 127) and len(middle.unique()) > 50
    y = int8_linear(hidden, second, torch.exp2(d.float()), torch.tensor([2.0**c]))
    assert torch.equal(y, torch.ldexp((middle @ second.long().t()).float(), c + d.view(-1)))
