"""torch's 4-bit operator on the CPU and the slabs beside it, against float64 on the weights that codes stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq_kernels.int_linear import int4pack
from llmq_kernels.weights import PackedInt

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative root mean square error of many numbers: in bfloat16 weights, shifts and results are rounded, in float16
# results alone, and a rounding's square is (half a unit)² / 3 on average; in float32 nothing but sums.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
MANY = 100


def weight(
    bits: int, out: int, n: int, group: int, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Words, scale, zero of a random weight, and the weight in float64; written bit by bit, without llmq's packing."""
    generator = torch.Generator().manual_seed(bits * 1000 + out + n + group)
    codes = torch.randint(0, 2**bits, (out, n), generator=generator)
    stream = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).reshape(out, n * bits)
    stream = torch.nn.functional.pad(stream, (0, -(n * bits) % 32)).view(out, -1, 32)
    words = (stream << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)
    groups = -(-n // group)
    sign = torch.randint(0, 2, (out, groups), generator=generator) * 2 - 1
    scale = ((torch.rand(out, groups, generator=generator) + 0.1) * sign).to(scale_dtype)
    low = -(2 ** (bits - 1))
    zero = None if symmetric else torch.randint(low, -low, (out, groups), generator=generator).to(torch.int8)
    of_group = torch.arange(n) // group
    exact = (codes + low).double()
    if zero is not None:
        exact -= zero.double()[:, of_group]
    return words, scale, zero, exact * scale.double()[:, of_group]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def allowed(x: Tensor, exact: Tensor, shift: Tensor, product: Tensor, result: Tensor) -> Tensor:
    """How far each number of a result in x's dtype may be from the exact one, by what is rounded on the way.

    The result: by half a unit, and before the bias is added once more. Sums in float32: by its half unit times the
    root of their length, 6 times over, of the terms' magnitudes (Higham and Mary 2019, theorem 2.4). In bfloat16
    weights too, independently, and `shift`, what zero points take off a group's weights: by Hoeffding's inequality
    such a sum is off by more than 6 roots of the sum of the squares once in 30 million. In float16 weights are not
    rounded, so that a single result is off by 2⁻¹¹ of itself (4.9e-4) and what float32 adds.
    """
    wide, half = x.double(), torch.finfo(x.dtype).eps / 2
    magnitudes = wide.abs() @ (exact.abs() + shift.abs()).t()
    sums = 6 * (x.shape[1] + 1) ** 0.5 * 2.0**-24 * magnitudes
    off = sums + half * (product.abs() + result.abs()) + torch.finfo(x.dtype).smallest_normal * half
    if x.dtype == torch.bfloat16:
        off += 6 * half * (wide.square() @ exact.square().t()).sqrt()
        off += 6 * half * (wide.square() @ shift.square().t()).sqrt()
    return off * (1 + 4 * half)


def check_product(got: Tensor, x: Tensor, exact: Tensor, shift: Tensor, bias: Tensor | None = None) -> None:
    """Each number within what rounding explains, and many of them within what it makes on average."""
    product = x.double() @ exact.t()
    expected = product if bias is None else product + bias.double()
    assert got.dtype == x.dtype and got.shape == expected.shape
    assert ((got.double() - expected).abs() <= allowed(x, exact, shift, product, expected)).all()
    assert got.numel() < MANY or error(got, expected) < TOLERANCE[x.dtype]


def shifts(scale: Tensor, zero: Tensor | None, n: int, group: int) -> Tensor:
    """scale · zero of every weight, float64 [out, n]."""
    of_group = torch.arange(n) // group
    return (scale.double() * (0 if zero is None else zero.double()))[:, of_group]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_linear_and_dequantize_are_those_of_the_weight(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    out, n = 192, 384
    words, scale, zero, exact = weight(bits, out, n, group, symmetric)
    packed = int4pack.pack(PackedInt(words, scale, zero, bits, len(words), n, group), dtype)
    assert packed.packed.numel() == out * n // 2
    assert torch.equal(int4pack.dequantize(packed, torch.float32).double(), exact)
    assert torch.equal(int4pack.dequantize(packed, dtype), exact.to(torch.float32).to(dtype))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(out, generator=generator).to(dtype)
    for rows in (1, 2, 3, 7, 16, 17, 33, 130):
        x = (torch.randn(rows, n, generator=generator) + 0.2).to(dtype)
        got = int4pack.linear(x, packed, bias if rows % 2 else None)
        assert got.is_contiguous()
        check_product(got, x, exact, shifts(scale, zero, n, group), bias if rows % 2 else None)


@pytest.mark.parametrize(
    ("out", "n", "group"),
    [(1, 32, 32), (16, 64, 32), (48, 96, 96), (65, 160, 64), (72, 128, 4096), (100, 1056, 1056), (130, 96, 32)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_outputs_and_any_multiple_of_32_inputs(out: int, n: int, group: int, dtype: torch.dtype) -> None:
    words, scale, zero, exact = weight(4, out, n, group, False)
    assert int4pack.refusal(CPU, dtype, 4, out, n, group) is None
    packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), n, group), dtype)
    assert torch.equal(int4pack.dequantize(packed, torch.float32).double(), exact)
    for rows in (0, 1, 5, 130):
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = int4pack.linear(x, packed, None)
        check_product(got, x, exact, shifts(scale, zero, n, group))


@pytest.mark.parametrize("narrow", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_slabs_are_the_same_as_one(narrow: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    words, scale, zero, exact = weight(4, 320, 256, 64, False)
    packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 256, 64), dtype)
    for name, value in (("SLAB", 2 * 256 * 64), ("MANY", 3 * 256 * 64), ("NARROW", narrow), ("MOST", 0)):
        monkeypatch.setattr(int4pack, name, value)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_product(int4pack.linear(x, packed, None), x, exact, shifts(scale, zero, 256, 64))


@pytest.mark.parametrize(("a_row", "more", "expected"), [(4.0, 2.0, 30), (1.0, 2.0, int4pack.MOST)])
def test_where_slabs_become_faster_is_measured(
    a_row: float, more: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator takes a_row for each row, slabs 60 and `more` for each."""
    taken: list[float] = []
    monkeypatch.setattr(int4pack, "_by_operator", lambda x, weight: taken.append(a_row * len(x)))
    monkeypatch.setattr(int4pack, "_by_slabs", lambda x, weight, blocks: taken.append(60 + more * len(x)))

    def fastest(product: Callable[[Tensor, Tensor], object], x: Tensor, weights: Tensor) -> float:
        product(x, weights[0])
        return taken[-1]

    monkeypatch.setattr(int4pack, "fastest", fastest)
    assert int4pack._operator_rows.__wrapped__() == expected


def test_float32_scales_are_kept_for_float16_that_could_not_hold_them() -> None:
    words, _, _, _ = weight(4, 64, 64, 32, True)
    scale = torch.full((64, 2), 3e-8)
    packed = int4pack.pack(PackedInt(words, scale, None, 4, len(words), 64, 32), torch.float16)
    x = torch.full((2, 64), 1e4, dtype=torch.float16)
    exact = int4pack.dequantize(packed, torch.float32).double()
    assert 0 < exact.abs().max() < 3e-7
    assert error(int4pack.linear(x, packed, None), x.double() @ exact.t()) < 1e-3


def test_a_weight_that_was_packed_for_another_dtype_still_gives_right_numbers() -> None:
    words, scale, zero, exact = weight(4, 64, 128, 32, False)
    for packed_for in DTYPES:
        packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 128, 32), packed_for)
        for dtype in DTYPES:
            x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
            check_product(int4pack.linear(x, packed, None), x, exact, shifts(scale, zero, 128, 32))


def test_default_device_and_dtype_of_a_program_that_loads_a_model_change_nothing() -> None:
    words, scale, zero, exact = weight(4, 64, 128, 32, False)
    x = torch.randn(60, 128, generator=torch.Generator().manual_seed(0))
    int4pack.packing.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 128, 32), torch.float32)
            got = int4pack.linear(x, packed, None)
            dense = int4pack.dequantize(packed, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(got, x.double() @ exact.t()) < 1e-6 and torch.equal(dense.double(), exact)


@pytest.mark.parametrize(
    ("device", "dtype", "bits", "out", "n", "group", "reason"),
    [
        ("cuda", torch.bfloat16, 4, 64, 64, 32, "for CPUs, not cuda"),
        ("cpu", torch.float64, 4, 64, 64, 32, "not torch.float64"),
        ("cpu", torch.bfloat16, 8, 64, 64, 32, "up to 4 bits, not 8"),
        ("cpu", torch.bfloat16, 4, 64, 72, 72, "that 32 divides, not 72 in groups of 72"),
        ("cpu", torch.bfloat16, 4, 64, 96, 48, "that 32 divides, not 96 in groups of 48"),
        ("cpu", torch.bfloat16, 4, 64, 96, 16, "that 32 divides, not 96 in groups of 16"),
        ("cpu", torch.bfloat16, 4, 0, 96, 32, "no weight of 0 x 96"),
    ],
)
def test_refusals_say_why(
    device: str, dtype: torch.dtype, bits: int, out: int, n: int, group: int, reason: str
) -> None:
    assert reason in str(int4pack.refusal(torch.device(device), dtype, bits, out, n, group))


def test_a_torch_that_packs_in_an_unknown_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4pack, "packing", lambda: None)
    assert "order" in str(int4pack.refusal(CPU, torch.bfloat16, 4, 64, 64, 32))
    words, scale, zero, _ = weight(4, 64, 64, 32, True)
    with pytest.raises(ValueError, match="order"):
        int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 64, 32), torch.bfloat16)


def test_tensors_that_disagree_are_refused() -> None:
    words, scale, zero, _ = weight(4, 64, 128, 32, False)
    with pytest.raises(ValueError, match=r"scale must be \[64, 2\] for groups of 64, not \[64, 4\]"):
        int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 128, 64), torch.bfloat16)
    with pytest.raises(ValueError, match=r"words must be \[64, 20\], not \[64, 16\]"):
        int4pack.pack(PackedInt(words, torch.ones(64, 5), None, 4, len(words), 160, 32), torch.bfloat16)
    packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 128, 32), torch.bfloat16)
    assert packed.zero is not None
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \[rows, 128\], not \[2, 64\]"):
        int4pack.linear(x[:, :64], packed, None)
    parts: tuple[dict[str, Tensor], ...] = (
        {"packed": packed.packed[:32]},
        {"scale": packed.scale[:3]},
        {"zero": packed.zero[:2]},
    )
    for part in parts:
        with pytest.raises(ValueError, match="a weight of 64 x 128 needs packed u8"):
            int4pack.linear(x, replace(packed, **part), None)


CAPABILITY = """
import torch
from llmq_kernels.int_linear import int4pack
from llmq_kernels.weights import PackedInt
torch.manual_seed(0)
words = torch.randint(-2**31, 2**31 - 1, (72, 16)).to(torch.int32)
scale, zero = torch.rand(72, 4).bfloat16() + 0.5, torch.randint(-8, 8, (72, 4)).to(torch.int8)
codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15).view(72, 4, 32) - 8
exact = ((codes - zero.unsqueeze(-1)).double() * scale.double().unsqueeze(-1)).view(72, 128)
for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
    packed = int4pack.pack(PackedInt(words, scale, zero, 4, len(words), 128, 32), dtype)
    assert torch.equal(int4pack.dequantize(packed, torch.float32).double(), exact)
    for rows in (1, 6, 60):
        x = torch.randn(rows, 128).to(dtype)
        y = int4pack.linear(x, packed, None).double()
        assert (y - x.double() @ exact.t()).norm() / y.norm() < tolerance, rows
print(int4pack.packing(), int4pack._operator_is_fast())
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_cpus_pack_otherwise_and_give_the_same(capability: str) -> None:
    """ATen's code for lesser CPUs, which packs in another order; oneDNN's too, which then knows no 16-bit matmul."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment["PYTHONPATH"] = str(Path(int4pack.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", CAPABILITY], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Packing(block=" in run.stdout
