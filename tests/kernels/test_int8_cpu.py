"""W8A8 on the CPU: exact sums, the rounding that the accuracy was measured with, on any processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.grids.activations import round_per_token, round_static
from llmq_kernels.int8_linear import cpu as int8_cpu
from llmq_kernels.int_linear import int8pack
from llmq_kernels.weights import PackedInt8

ROWS = (1, 2, 3, 4, 5, 17, 130)


def draw(rows: int, out: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of very different sizes, one of zeros among them; a weight over its whole grid; scales of both signs."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-5, 3, rows).unsqueeze(1)
    if rows > 2:
        x[1] = 0
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    return x.to(dtype), weight, torch.randn(out, 1, generator=generator) * 0.02


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("instructions", "one_by_one"), [(True, 1), (True, 7), (False, 0)])
def test_products_are_exact(rows: int, instructions: bool, one_by_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if instructions and not int8_cpu._has_instructions():
        pytest.skip("this processor has no instructions for it")
    monkeypatch.setattr(int8_cpu, "_has_instructions", lambda: instructions)
    monkeypatch.setattr(int8_cpu, "_times", lambda: int8_cpu.Times(1.0, 0.0, one_by_one + 0.5))
    for out, width in ((5, 77), (33, 2500), (130, 4096)):
        codes = torch.full((rows, width), -128, dtype=torch.int8)
        codes[0] = torch.randint(-128, 128, (width,), dtype=torch.int8)
        weight = torch.full((out, width), -128, dtype=torch.int8)
        weight[1:] = torch.randint(-128, 128, (out - 1, width), dtype=torch.int8)
        assert torch.equal(int8_cpu.multiply(codes, weight).long(), codes.long() @ weight.long().t())


def test_products_that_saturate_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without VNNI: two products of an unsigned and a signed byte are added in 16 bits."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        terms = (a.int().unsqueeze(2) + 128) * b.int().unsqueeze(0)
        pairs = terms.view(len(a), -1, 2, b.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1).to(torch.int32) - 128 * b.int().sum(0)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    small = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    assert torch.equal(saturating(small, small.t()).long(), small.long() @ small.long().t())
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8_cpu._has_instructions.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int())
    assert int8_cpu._has_instructions.__wrapped__()


EXACT = """
import torch
from llmq_kernels.int8_linear import cpu as int8_cpu
weight = torch.randint(0, 2, (70, 4096)).mul_(255).sub_(128).to(torch.int8)
for rows in (1, 3, 17, 130):
    codes = torch.randint(0, 2, (rows, 4096)).mul_(255).sub_(128).to(torch.int8)
    assert torch.equal(int8_cpu.multiply(codes, weight).long(), codes.long() @ weight.long().t()), rows
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
@pytest.mark.parametrize("onednn", ["AVX512_CORE", "AVX2"])
def test_products_are_exact_on_lesser_processors(capability: str, onednn: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn}
    environment["PYTHONPATH"] = str(Path(int8_cpu.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", [None, 0.013])
def test_rounds_inputs_as_the_quantizer_does(dtype: torch.dtype, static: float | None) -> None:
    x, _, _ = draw(64, 5, 300, dtype)
    known = None if static is None else torch.tensor([static])
    codes, scale = int8_cpu.round_input(x, known)
    expected = round_per_token(x, "int") if known is None else round_static(x, known, "int")
    assert torch.equal(codes.to(dtype) * scale, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_is_the_float64_product_of_what_was_rounded(rows: int, dtype: torch.dtype) -> None:
    x, weight, scale = draw(rows, 33, 300, dtype)
    bias = torch.randn(33).to(dtype)
    y = int8_cpu.linear(x, PackedInt8(weight, scale, None), bias)
    codes, x_scale = int8_cpu.round_input(x, None)
    exact = (codes.double() * x_scale.double()) @ (weight.double() * scale.double()).t() + bias.double()
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact.to(dtype).double(), rtol=3 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("static", [None, 0.013])
def test_some_rows_and_values_at_a_time_are_the_same_as_all(
    static: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, scale = draw(70, 33, 300, torch.bfloat16)
    stored = PackedInt8(weight, scale, None if static is None else torch.tensor([static]))
    bias = torch.randn(33)
    whole = int8_cpu.linear(x, stored, bias)
    monkeypatch.setattr(int8_cpu, "ROWS", 16)
    monkeypatch.setattr(int8_cpu, "SLAB", 900)
    assert torch.equal(int8_cpu.linear(x, stored, bias), whole)
    assert int8_cpu.linear(x[:0], stored, bias).shape == (0, 33)


def test_what_is_fastest_for_few_rows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_cpu, "fastest", lambda product, x, weights: (product.__name__, len(x), len(weights)))
    measured = int8_cpu._times.__wrapped__()
    assert measured.one[:2] == ("_each", 1) and measured.multiple[:2] == ("_turned", int8_cpu.MULTIPLE)
    monkeypatch.setattr(int8_cpu, "_has_instructions", lambda: True)
    monkeypatch.setattr(int8pack, "operator_is_fast", lambda: True)
    monkeypatch.setattr(int8_cpu, "_times", lambda: int8_cpu.Times(1.0, 2.5, 3.0))
    assert [rows for rows in range(9) if int8_cpu._operator_is_fastest(rows, 64)] == [3, 4]
    assert not int8_cpu._operator_is_fastest(3, 80)
    monkeypatch.setattr(int8_cpu, "_times", lambda: int8_cpu.Times(1.0, 3.5, 3.0))
    assert not int8_cpu._operator_is_fastest(4, 64)


@pytest.mark.skipif(not int8pack.operator_is_fast(), reason="torch has no fast 8-bit operator here")
@pytest.mark.parametrize("rows", [2, 4])
def test_few_rows_of_bfloat16_are_rounded_twice_at_most(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale = draw(rows, 130, 4096, torch.bfloat16)
    stored, bias = PackedInt8(weight, scale, None), torch.randn(130)
    monkeypatch.setattr(int8_cpu, "_operator_is_fastest", lambda rows, width: False)
    once = int8_cpu.linear(x, stored, None)
    monkeypatch.setattr(int8_cpu, "_operator_is_fastest", lambda rows, width: True)
    twice = int8_cpu.linear(x, stored, None)
    assert not torch.equal(once, twice)
    codes, x_scale = int8_cpu.round_input(x, None)
    exact = (codes.double() * x_scale.double()) @ (weight.double() * scale.double()).t()
    assert ((twice.double() - exact).abs() <= 2.0**-7 * (1 + 2.0**-8) * exact.abs()).all()
    assert torch.allclose(int8_cpu.linear(x, stored, bias), (exact + bias).bfloat16(), rtol=2**-6, atol=1e-4)
    # Of a weight that is not whole in memory torch's operator makes an error.
    strided = torch.empty(260, 4096, dtype=torch.int8)[::2].copy_(weight)
    assert torch.equal(int8_cpu.linear(x, PackedInt8(strided, scale, None), None), once)


def test_refuses_sums_that_might_overflow() -> None:
    with pytest.raises(ValueError, match="131071 inputs, not 131072"):
        weight = PackedInt8(torch.zeros(1, 131072, dtype=torch.int8), torch.ones(1, 1), None)
        int8_cpu.linear(torch.zeros(1, 131072), weight, None)
