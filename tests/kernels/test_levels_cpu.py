"""Codebooks of each row: the operator against its twin, and the twin against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.levels_linear import cpu as levels_cpu
from llmq_kernels.levels_linear import reference as levels_reference
from llmq_kernels.weights import PackedLevels

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def packed(out: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (out, -(-width // 2)), dtype=torch.uint8, generator=generator)
    return codes, torch.randn(out, 16, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (7, 33), (33, 128), (300, 4100)])
def test_the_operator_is_its_twin(out: int, width: int, dtype: torch.dtype) -> None:
    codes, levels = packed(out, width)
    bias = torch.randn(out).to(dtype)
    dense = levels_reference.levels_dequantize(codes, levels, width)
    for row, column in ((0, 0), (out - 1, width - 1), (out // 2, width // 2)):
        byte = int(codes[row, column // 2])
        assert dense[row, column] == levels[row, byte >> 4 if column % 2 else byte & 15]
    weight = PackedLevels(codes, levels, out, width)
    assert torch.equal(levels_cpu.dequantize(weight, torch.float32), dense)
    for shape in ((1, width), (2, 5, width)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = torch.ops.llmq.levels_linear(x, codes, levels, bias, out, width)
        torch.testing.assert_close(got, levels_reference.levels_linear(x, codes, levels, bias), rtol=2e-2, atol=0.5)
        exact = x.double() @ dense.double().t() + bias.double()
        size = x.double().abs() @ dense.double().abs().t() + 1
        assert ((got.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * size).all()


def test_gradients_and_tracing() -> None:
    codes, levels = packed(12, 66)
    x = torch.randn(2, 3, 66, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.llmq.levels_linear.default, (x, codes, levels, bias, 12, 66), test_utils=CHECKS)
    dense = levels_reference.levels_dequantize(codes, levels, 66)
    torch.ops.llmq.levels_linear(x, codes, levels, bias, 12, 66).sum().backward()
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    torch.testing.assert_close(bias.grad, torch.full((12,), 6.0))
    with pytest.raises(NotImplementedError, match="frozen"):
        torch.ops.llmq.levels_linear(x, codes, levels.clone().requires_grad_(), None, 12, 66)


def test_what_does_not_fit_is_refused() -> None:
    codes, levels = packed(8, 64)
    x = torch.randn(1, 64)
    for wrong in ((codes[:, :-1], levels), (codes, levels[:, :8])):
        with pytest.raises(ValueError, match="must be"):
            torch.ops.llmq.levels_linear(x, *wrong, None, 8, 64)
    assert torch.ops.llmq.levels_linear(x[:0], codes, levels, None, 8, 64).shape == (0, 8)
