"""torch's 8-bit operator on the CPU and the slabs beside it, against float64 on the weights that codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq_kernels.int_linear import dense_bits, int8pack
from llmq_kernels.weights import PackedInt
from tests.kernels.test_int4pack import CPU, check_product, error, shifts, weight

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(not int8pack.operator_is_fast(), reason="torch has no 8-bit operator here")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 384])
def test_linear_and_dequantize_are_those_of_the_weight(group: int, symmetric: bool) -> None:
    out, n = 100, 384
    words, scale, zero, exact = weight(8, out, n, group, symmetric)
    plain = PackedInt(words, scale, zero, 8, out, n, group)
    packed = int8pack.pack(plain, BF16)
    assert packed.packed.numel() == out * n and packed.packed.shape[2] == group
    assert torch.equal(int8pack.dequantize(packed, torch.float32).double(), exact)
    assert torch.equal(int8pack.dequantize(packed, BF16), dense_bits.dequantize(plain, BF16))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(out, generator=generator).to(BF16)
    for rows in (1, 2, 3, 7, 12, 13, 16, 17, 33, 130):
        x = (torch.randn(rows, n, generator=generator) + 0.2).to(BF16)
        got = int8pack.linear(x, packed, bias if rows % 2 else None)
        assert got.is_contiguous()
        check_product(got, x, exact, shifts(scale, zero, n, group), bias if rows % 2 else None)


@pytest.mark.parametrize(("out", "n", "group"), [(1, 32, 32), (3, 64, 32), (7, 96, 96), (65, 160, 4096), (130, 96, 32)])
def test_any_number_of_outputs_and_any_multiple_of_32_inputs(out: int, n: int, group: int) -> None:
    words, scale, zero, exact = weight(8, out, n, group, True)
    assert int8pack.refusal(CPU, BF16, 8, out, n, group) is None
    packed = int8pack.pack(PackedInt(words, scale, zero, 8, out, n, group), BF16)
    for rows in (0, 1, 5, 130):
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)).to(BF16)
        check_product(int8pack.linear(x, packed, None), x, exact, shifts(scale, zero, n, group))


def test_sums_of_many_groups_are_about_as_exact_as_one_product() -> None:
    """Partial sums are bfloat16: together they are off by about what the last rounding is off by."""
    words, scale, zero, exact = weight(8, 256, 8192, 32, True)
    packed = int8pack.pack(PackedInt(words, scale, zero, 8, 256, 8192, 32), BF16)
    x = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0)).to(BF16)
    product = x.double() @ exact.t()
    assert error(int8pack.linear(x, packed, None), product) < 2 * error(product.to(BF16), product)


def test_many_slabs_are_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scale, zero, exact = weight(8, 50, 256, 64, False)
    packed = int8pack.pack(PackedInt(words, scale, zero, 8, 50, 256, 64), BF16)
    monkeypatch.setattr(int8pack, "SLAB", 7 * 256)
    monkeypatch.setattr(int8pack, "slab_size", lambda x, width: 7 * 256)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    assert error(int8pack.linear(x, packed, None), x.double() @ exact.t()) < 1e-6
    assert torch.equal(int8pack.dequantize(packed, torch.float32).double(), exact)


@pytest.mark.parametrize(
    ("device", "dtype", "bits", "n", "group", "reason"),
    [
        ("cuda", BF16, 8, 64, 32, "for CPUs"),
        ("cpu", torch.float32, 8, 64, 32, "bfloat16"),
        ("cpu", BF16, 4, 64, 32, "8 bits"),
        ("cpu", BF16, 8, 80, 16, "32 divides"),
        ("cpu", BF16, 8, 100, 64, "32 divides"),
        ("cpu", BF16, 8, 0, 64, "no weight"),
    ],
)
def test_what_is_not_supported_has_a_reason(
    device: str, dtype: torch.dtype, bits: int, n: int, group: int, reason: str
) -> None:
    assert reason in str(int8pack.refusal(torch.device(device), dtype, bits, 8, n, group))
    if device == "cpu":
        words, scale = torch.zeros(8, n * bits // 32, dtype=torch.int32), torch.ones(8, 1)
        with pytest.raises(ValueError, match=reason):
            int8pack.pack(PackedInt(words, scale, None, bits, 8, n, group), dtype)


def test_tensors_that_do_not_fit_are_refused() -> None:
    words, scale, _, _ = weight(8, 8, 64, 32, True)
    plain = PackedInt(words, scale, None, 8, 8, 64, 32)
    with pytest.raises(ValueError, match="scale must be"):
        int8pack.pack(replace(plain, scale=scale[:, :1]), BF16)
    packed = int8pack.pack(plain, BF16)
    x = torch.ones(1, 64, dtype=BF16)
    for wrong in (
        replace(packed, packed=packed.packed[:, :4]),
        replace(packed, scale=packed.scale[:1]),
        replace(packed, scale=packed.scale.float()),
        replace(packed, zero=torch.zeros(8, 2, dtype=torch.int8)),
        replace(packed, group_size=64),
    ):
        with pytest.raises(ValueError, match=r"from int8pack\.pack"):
            int8pack.linear(x, wrong, None)
    with pytest.raises(ValueError, match="x must be"):
        int8pack.linear(x[:, :32], packed, None)


def test_a_processor_without_vectors_keeps_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8pack, "operator_is_fast", lambda: False)
    assert "no fast operator" in str(int8pack.refusal(CPU, BF16, 8, 8, 64, 32))
