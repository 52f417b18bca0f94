"""Codebooks of 16 values in the layout "planes": by every family of kernels, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.codebook_linear import reference as codebook_reference
from llmq_kernels.int_linear import planes
from llmq_kernels.levels_linear import reference as levels_reference
from llmq_kernels.triton import tables
from llmq_kernels.triton.config import Config
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels
from tests.kernels.test_triton_int import FEW_ROWS, MANY_ROWS, ONE_ROW
from tests.kernels.weights import tolerance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    planes.forget()
    yield
    planes.forget()


def draw(out: int, width: int, group: int, per_row: bool) -> tuple[PackedInt, Tensor]:
    """Random codes, magnitudes and entries of both signs, and the weight in float64, computed code by code."""
    generator = torch.Generator().manual_seed(out * width)
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    scale = torch.randn(out, -(-width // group), generator=generator)
    codebook = torch.randn(out if per_row else 1, 16, generator=generator)
    entries = codebook.double().expand(out, 16).gather(1, codes.long())
    dense = entries * scale.double().repeat_interleave(group, 1)[:, :width]
    halves = (slice(0, out // 2), slice(out // 2, out))
    parts = ((rows, codes[rows].to(DEVICE)) for rows in halves)
    return codebooks.pack(parts, scale.to(DEVICE), codebook.to(DEVICE), width), dense


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [ONE_ROW, FEW_ROWS, MANY_ROWS], ids=lambda config: config.family)
def test_products_are_those_of_the_float64_weight(
    monkeypatch: pytest.MonkeyPatch, config: Config, dtype: torch.dtype, per_row: bool
) -> None:
    """In whole tiles and groups of half a tile, and in 200 inputs that are no multiple of anything."""
    monkeypatch.setattr(tables, "choose", lambda *_: config)
    for width, group in ((256, 64), (200, 200)):
        weight, dense = draw(19, width, group, per_row)
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        bias = torch.linspace(-1, 1, 19).to(dtype)
        y = planes.linear(x.to(DEVICE), weight, bias.to(DEVICE)).cpu()
        exact = x.double() @ dense.t() + bias.double()
        allowed = tolerance(x, dense) + torch.finfo(dtype).eps * exact.abs()
        assert y.dtype == dtype and ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("per_row", [False, True])
def test_dequantizing_rounds_once(monkeypatch: pytest.MonkeyPatch, per_row: bool) -> None:
    weight, _ = draw(21, 300, 300, per_row)
    assert weight.codebook is not None
    for dtype in (torch.float32, torch.bfloat16):
        codebook, scale = weight.codebook.expand(21, 16), weight.scale.t()
        codes = torch.stack([weight.packed.view(21, -1, 32) >> 4 * j & 15 for j in range(4)], 2).view(21, -1)[:, :300]
        expected = (codebook.gather(1, codes.long()) * scale).to(dtype)
        assert torch.equal(planes.dequantize(weight, dtype), expected)
    monkeypatch.setattr(planes, "WORKSPACE", 3000)
    x = torch.randn(5, 300).to(torch.bfloat16).to(DEVICE)
    whole = x.float() @ planes.dequantize(weight, torch.float32).t()
    torch.testing.assert_close(planes.dense(x, weight, None).float(), whole, rtol=0.02, atol=0.3)


def test_a_codebook_of_another_shape_is_an_error() -> None:
    from dataclasses import replace

    weight, _ = draw(8, 64, 64, True)
    assert weight.codebook is not None
    with pytest.raises(ValueError, match="codebook must be"):
        planes.linear(torch.zeros(1, 64).to(torch.bfloat16), replace(weight, codebook=weight.codebook[:3]), None)


def test_the_twin_and_gradients() -> None:
    weight, dense = draw(12, 128, 64, False)
    assert weight.codebook is not None and weight.tables is not None
    arguments = (weight.packed, weight.scale, weight.codebook, weight.tables)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    bias = torch.zeros(12, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.llmq.codebook_linear.default, (x, *arguments, bias, 12, 128, 64))
    y = torch.ops.llmq.codebook_linear(x, *arguments, bias, 12, 128, 64)
    codes = (
        torch.stack([weight.packed.view(12, -1, 32) >> 4 * j & 15 for j in range(4)], 2).view(12, -1).to(torch.uint8)
    )
    twin = codebook_reference.codebook_linear(x.detach(), codes, weight.scale.t(), weight.codebook, None)
    assert ((y - twin).double().abs() <= 2 * tolerance(x.detach().cpu().view(6, 128), dense).view(2, 3, 12)).all()
    y.sum().backward()
    assert x.grad is not None and bias.grad is not None and (bias.grad == 6).all()
    torch.testing.assert_close(x.grad.float(), dense.float().sum(0).expand(2, 3, 128), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_stores(nested: bool) -> None:
    """Dequantized bit for bit, in odd rows of several slabs; blocks that do not divide rows are refused."""
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type=kind, compress_statistics=nested)
        inner = (state.state2.absmax, state.state2.code, float(state.offset)) if nested else (None, None, 0.0)
        stored = PackedCodebook(packed.view(-1), state.absmax, state.code, *inner, 5, 192, 64)
        made = planes.dequantize(codebooks.of_blocks(stored), torch.bfloat16).cpu()
        assert torch.equal(made, functional.dequantize_4bit(packed, state).to(torch.bfloat16))
    assert "do not divide" in str(codebooks.refusal(DEVICE, torch.bfloat16, 96, 64))
    assert "do not divide" in str(codebooks.refusal(DEVICE, torch.bfloat16, 32, 64))
    assert codebooks.refusal(DEVICE, torch.bfloat16, 192, 64) is None


def test_what_needs_the_operator() -> None:
    x, bias = torch.zeros(1, 4), torch.zeros(4, requires_grad=True)
    assert planes.direct(x) and planes.direct(x, bias.detach())
    assert not planes.direct(x, bias) and not planes.direct(x.clone().requires_grad_())
    with torch.no_grad():
        assert planes.direct(x, bias)
    with torch.autograd.forward_ad.dual_level():
        assert not planes.direct(torch.autograd.forward_ad.make_dual(x, x))
    seen = []
    torch.jit.trace(lambda one: seen.append(planes.direct(one)) or one + 1, (x,), check_trace=False)
    assert seen == [False]


def test_levels_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "SLAB", 100)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (7, 33), dtype=torch.uint8, generator=generator)
    levels = torch.randn(7, 16, generator=generator)
    weight = codebooks.of_levels(PackedLevels(packed.to(DEVICE), levels.to(DEVICE), 7, 65))
    assert torch.equal(
        planes.dequantize(weight, torch.float32).cpu(), levels_reference.levels_dequantize(packed, levels, 65)
    )
